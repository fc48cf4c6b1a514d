"""What a published checkpoint holds, which weights, and what is refused."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmman
from mmman.errors import CheckpointError
from mmman.runtime.formats import backbone_config
from mmman.runtime.publish import publish
from tests.toy import toy_batches, toy_config
from tools import publish_model

CONFIG = """
import_nothing = open('ran', 'w')
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmman.LocalBackbone', num_blocks=2, backbone=dict(type='{}', depth=18, style='{}')),
    data_preprocessor=dict(std=[-1.0, float('inf')]))
"""


def saved(path, **changes):
    """A training checkpoint with every part that mmengine's runner writes, and a few tensors."""
    torch.manual_seed(0)
    names = (
        'backbone.conv1.weight',
        'backbone.local.layer1_1.transfer.delta',
        'backbone.local.layer1_1.fc.bias',
        'head.fc.bias',
    )
    content = {
        'meta': {
            'cfg': CONFIG.format('ResNet', 'pytorch'),
            'epoch': 3,
            'iter': 12,
            'seed': 0,
            'mmengine_version': '0.10.7',
            'dataset_meta': {'classes': ('a', 'b'), 'palette': np.arange(6.0).reshape(2, 3), 'label_map': None},
        },
        'state_dict': {name: torch.rand(3) for name in names},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0], [1])}},
        'optimizer': {'state': {0: {'momentum_buffer': torch.rand(1000)}}, 'param_groups': []},
        'param_schedulers': [{'last_step': 12}],
        **changes,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def test_only_weights_and_plain_meta_are_published(tmp_path):
    source = saved(tmp_path / 'epoch_3.pth')
    file, summary = publish(source, tmp_path / 'shared' / 'model.v1.pth')
    assert file.name == f'model.v1-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    published, trained = torch.load(file), torch.load(source)['state_dict']
    assert published.keys() == {'state_dict', 'meta'}
    assert [*published['state_dict']] == ['backbone.conv1.weight', 'head.fc.bias']
    assert all(torch.equal(tensor, trained[name]) for name, tensor in published['state_dict'].items())
    text = published['meta'].pop('cfg')
    assert 'open' not in text and backbone_config(text) == {'type': 'ResNet', 'depth': 18, 'style': 'pytorch'}
    assert published['meta'] == {
        'dataset_meta': {'classes': ('a', 'b'), 'palette': [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]},
        'epoch': 3,
        'iter': 12,
        'mmengine_version': '0.10.7',
        'mmman_version': mmman.__version__,
    }
    assert re.fullmatch(
        r'2 tensors, 0\.0 MB; the trained weights; names as in the model; dropped: 2 tensors of local heads', summary
    )


def test_a_published_file_needs_torch_alone(tmp_path):
    file, _ = publish(saved(tmp_path / 'a.pth'), tmp_path / 'b.pth')
    code = (
        'import sys, torch\n'
        f'print(sorted(torch.load({str(file)!r}, weights_only=True)["state_dict"]))\n'
        'assert not {"mmman", "mmengine"} & {*sys.modules}'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "['backbone.conv1.weight', 'head.fc.bias']"


def test_views_of_large_storages_are_written_small(tmp_path):
    source = saved(tmp_path / 'a.pth', state_dict={'backbone.conv1.weight': torch.zeros(10**6)[:3]})
    file, _ = publish(source, tmp_path / 'b.pth')
    assert file.stat().st_size < 10_000 < source.stat().st_size


def test_the_backbone_alone(tmp_path):
    file, summary = publish(saved(tmp_path / 'a.pth'), tmp_path / 'b.pth', backbone_only=True)
    assert [*torch.load(file)['state_dict']] == ['backbone.conv1.weight']
    assert "init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')" in summary
    assert summary.endswith('dropped: 2 tensors of local heads, 1 tensors of neck and heads')


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    source = saved(tmp_path / 'a.pth')
    file, _ = publish(source, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match=f'{file.name} exists; give another OUT, or use --force'):
        publish(source, tmp_path / 'b.pth')
    assert publish(source, tmp_path / 'b.pth', force=True)[0] == file


@pytest.mark.parametrize(
    ('changes', 'options', 'message'),
    [
        ({'state_dict': None}, {}, 'has no weights: it has no state_dict, only meta, message_hub, optimizer; copy or'),
        (
            {'state_dict': {'head.fc.bias': torch.zeros(1)}},
            {'backbone_only': True},
            r'no tensor below .backbone\..*only head.\*',
        ),
        ({}, {'ema': True}, '--ema: the checkpoint has no averaged weights; leave --ema out'),
        ({}, {'library': 'timm'}, '--format timm: ResNet cannot be converted .* depth, width and stem'),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, options, message):
    with pytest.raises(CheckpointError, match=message):
        publish(saved(tmp_path / 'a.pth', **changes), tmp_path / 'b.pth', **options)
    assert [*tmp_path.iterdir()] == [tmp_path / 'a.pth']


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint at'):
        publish(tmp_path / 'none.pth', tmp_path / 'b.pth')
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(CheckpointError, match='not a checkpoint: it does not begin like a file of torch.save'):
        publish(tmp_path / 'text.pth', tmp_path / 'b.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='holds a list, not a dict of weights'):
        publish(tmp_path / 'list.pth', tmp_path / 'b.pth')


def test_averaged_and_trained_weights_of_an_ema_hook(tmp_path):
    torch.manual_seed(0)
    runner = Runner(
        MODELS.build(toy_config()),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(
            [{**batch, 'inputs': batch['inputs'].float()} for batch in toy_batches(3)], collate_fn=lambda batch: batch[0]
        ),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 3},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
        custom_hooks=[{'type': 'mmman.EMABiasHook'}, {'type': 'EMAHook', 'momentum': 0.5}],
        default_hooks={'logger': None, 'checkpoint': {'type': 'CheckpointHook', 'interval': 3, 'by_epoch': False}},
        experiment_name=tmp_path.name,
    )
    runner.train()
    average = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module.state_dict()
    trained = runner.model.state_dict()
    for ema, theirs, words in (
        (True, average, "EMAHook's averaged weights"),
        (False, trained, 'the trained weights (it also has averaged weights: use --ema to publish them)'),
    ):
        file, summary = publish(tmp_path / 'iter_3.pth', tmp_path / 'b.pth', ema=ema)
        ours = torch.load(file)['state_dict']
        assert words in summary
        assert [*ours] == [name for name in theirs if '.local.' not in name]
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not torch.equal(average['backbone.stem.weight'], trained['backbone.stem.weight'])


def test_module_versions_are_kept(tmp_path):
    model = MODELS.build(toy_config())
    file, _ = publish(saved(tmp_path / 'a.pth', state_dict=model.state_dict()), tmp_path / 'b.pth')
    versions = torch.load(file)['state_dict']._metadata
    assert versions['backbone.layer1.0.bn'] == {'version': 2}
    assert not any('local' in name for name in versions)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    command = ['publish_model.py', str(saved(tmp_path / 'a.pth')), str(tmp_path / 'b.pth'), '--backbone-only']
    monkeypatch.setattr(sys, 'argv', command)
    publish_model.main()
    (file,) = tmp_path.glob('b-????????.pth')
    printed = capsys.readouterr().out
    assert printed.startswith(f'{file}: 1 tensors, ') and printed.count('\n') == 1
    monkeypatch.setattr(sys, 'argv', [*command, '--ema'])
    with pytest.raises(SystemExit, match='--ema: the checkpoint has no averaged weights'):
        publish_model.main()
