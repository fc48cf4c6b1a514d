"""Trained models from checkpoints and work folders."""

import argparse
import shutil

import pytest
import torch

from mmman.errors import CheckpointError, ConfigError
from mmman.local.blocks import LocalBlocks
from mmman.runtime.trained_model import TrainedModel, add_model_arguments, find_config, load_models, positive, preprocess
from tests.trained import COUNT, ORDER, ToyImages, train


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp('runs') / 'toy')


def test_the_stock_model_has_the_weights_of_the_checkpoint(folder):
    one = TrainedModel.load(folder)
    state = torch.load(folder / 'iter_4.pth')['state_dict']
    assert not hasattr(one.model.backbone, 'local') and not one.model.training
    own = one.model.state_dict()
    assert own.keys() == {name for name in state if '.local.' not in name}
    assert all(torch.equal(value.cpu(), state[name]) for name, value in own.items())
    assert (one.name, one.work_dir, one.checkpoint.name) == (f'{folder.parent.name}/toy', folder, 'iter_4.pth')


def test_a_checkpoint_with_its_local_heads(folder):
    one = TrainedModel.load(folder / 'iter_4.pth', name='x', stock=False)
    state = torch.load(folder / 'iter_4.pth')['state_dict']
    assert isinstance(one.model.backbone.local, LocalBlocks) and one.name == 'x' and one.work_dir == folder
    assert all(torch.equal(value.cpu(), state[name]) for name, value in one.model.state_dict().items())


def test_batches_are_drawn_in_a_fixed_random_order(folder):
    one = TrainedModel.load(folder)
    images = torch.cat([preprocess(one.model, batch)['inputs'].cpu() for batch in one.batches(13, 4, 'train')])
    assert torch.equal(images, ToyImages().images[ORDER[:12]])
    assert sum(len(batch['inputs']) for batch in one.batches(1000, 5)) == COUNT - COUNT % 5


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match='has no checkpoint'):
        TrainedModel.load(tmp_path)
    wider = {'model.backbone.backbone.width': 6}
    with pytest.raises(CheckpointError, match=r'does not fit; name its config \(--configs\)'):
        TrainedModel.load(folder, options=wider)
    with pytest.raises(CheckpointError, match='it lacks .* local heads'):
        TrainedModel.load(folder, options={'model.backbone.num_blocks': 3}, stock=False)
    one = TrainedModel.load(folder)
    with pytest.raises(ConfigError, match=r'24 images are no batch of 25: raise --images, or lower --batch-size'):
        next(one.batches(100, 25))
    loader, one.cfg.val_dataloader = one.cfg.val_dataloader, None
    with pytest.raises(ConfigError, match='no val_dataloader'):
        next(one.batches(4, 4))
    one.cfg.val_dataloader = {**loader, 'dataset': {'type': open, 'file': 'nowhere.json'}}
    with pytest.raises(ConfigError, match='nowhere.json.*--cfg-options'):
        next(one.batches(4, 4))


def test_the_config_beside_a_checkpoint(folder, tmp_path):
    (config,) = folder.glob('*.py')
    assert find_config(folder / 'iter_4.pth') == config
    (tmp_path / 'a.py').touch()
    (tmp_path / 'b.py').touch()
    with pytest.raises(ConfigError, match='2 configs beside'):
        find_config(tmp_path / 'iter_1.pth')
    logged = tmp_path / '2026' / 'vis_data' / 'config.py'
    logged.parent.mkdir(parents=True)
    shutil.copy(config, logged)
    assert find_config(tmp_path / 'iter_1.pth') == logged


def test_arguments(folder, capsys):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, '+', images=5, batch_size=None)
    args = parser.parse_args([str(folder), str(folder), '--names', 'a', 'b', '--cfg-options', 'x=1'])
    assert [(one.name, one.cfg.x) for one in load_models(args)] == [('a', 1), ('b', 1)] and args.images == 5
    for option in ('names', 'configs'):
        args = parser.parse_args([str(folder), f'--{option}', 'a', 'b'])
        with pytest.raises(ConfigError, match=f'--{option} has 2 values for 1 models'):
            load_models(args)
    for word in ('0', '-1', 'x'):
        with pytest.raises(argparse.ArgumentTypeError, match='from 1'):
            positive(word)
