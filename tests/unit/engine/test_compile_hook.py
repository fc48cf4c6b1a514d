"""Units that are compiled train the same, and stay what they are in checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner

from mmman import delocalize_, localize_
from mmman.engine import LocalCompileHook
from mmman.errors import ConfigError
from tests.toy import toy_batches
from tests.unit.local.test_session import toy

pytestmark = pytest.mark.usefixtures('fresh_hub')


def train(folder, *hooks, **options):
    torch.manual_seed(0)
    runner = Runner(
        toy(**options),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(3), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 3, 'val_interval': 99},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
        custom_hooks=[*hooks, {'type': 'mmman.EMABiasHook', 'momentum': 0.9}],
        default_hooks={'checkpoint': None},
        experiment_name=f'{folder.name}-{len(hooks)}',
    )
    runner.train()
    return runner.model


def compiled(model):
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


def test_training_is_the_same(tmp_path, caplog):
    model = train(tmp_path, {'type': 'mmman.LocalCompileHook', 'options': {'backend': 'eager'}})
    assert 'recompile_limit' not in caplog.text
    plain = train(tmp_path).state_dict()
    assert model.state_dict().keys() == plain.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-10, atol=1e-12)
    found = compiled(model)
    assert {f'backbone.{name}' for name in ('stem', 'layer1.0', 'layer1.1', 'layer2.0', 'layer3.0', 'layer3.1')} <= found
    assert {f'backbone.local.{key}.transfer.momentum' for key in model.backbone.local} <= found
    delocalize_(model.backbone)


def test_recomputed_units_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r'LocalCompileHook cannot compile units that are recomputed \(layer2.0, layer2.1\)'):
        train(tmp_path, LocalCompileHook({'backend': 'eager'}), recompute=['layer2'])


def test_a_stem_in_chunks_is_refused_by_name():
    from mmdet.models import ResNet

    backbone = localize_(ResNet(18, base_channels=4, stem_channels=4), 1, recompute=['stem'])
    with pytest.raises(ConfigError, match=r'units that are recomputed \(stem\)'):
        LocalCompileHook().before_train(SimpleNamespace(model=torch.nn.ModuleDict({'backbone': backbone})))


def test_a_model_without_blocks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='0 localised backbones'):
        LocalCompileHook().before_train(Runner(torch.nn.Linear(1, 1), work_dir=str(tmp_path)))
