"""Cuts by memory, asked for in a config: the model is the one with the same cuts by name."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner

from mmman.errors import LocalLearningError, PartitionError
from mmman.partition import chain_of, plan_blocks
from mmman.planning.costs import MemoryPlan, peak_of
from mmman.planning.profile import Profile, profile_step
from tests.conftest import ROOT

pytestmark = pytest.mark.whole_models

CIFAR = Config.fromfile(ROOT / 'configs' / 'paper' / 'resnet32_manpp_k16_cifar10.py')
MEMORY = {'type': 'memory', 'model': CIFAR.model, 'batch': 16, 'shape': (32, 32)}


def backbone_of(blocks: int, partition: object, **options: object) -> torch.nn.Module:
    init_default_scope('mmpretrain')
    torch.manual_seed(3)
    return MODELS.build({**CIFAR.model.backbone, 'num_blocks': blocks, 'partition': partition, **options})


def cuts_of(backbone: torch.nn.Module) -> list[str]:
    return [block[-1].name for block in backbone.local.plan.blocks[:-1]]


def test_the_model_is_that_of_named_cuts(monkeypatch):
    def drawing(*args: object) -> Profile:
        random.random(), np.random.rand()
        return profile_step(*args)

    monkeypatch.setattr('mmman.planning.memory_cuts.profile_step', drawing)
    random.seed(1)
    np.random.seed(1)
    planned = backbone_of(3, {**MEMORY, 'optim_wrapper': CIFAR.optim_wrapper})
    drawn = torch.rand(3), random.random(), np.random.rand()
    scope = DefaultScope.get_current_instance()
    assert scope.scope_name == 'mmpretrain' and not scope.instance_name.startswith('overwrite')

    random.seed(1)
    np.random.seed(1)
    named = backbone_of(3, cuts_of(planned))
    assert torch.equal(drawn[0], torch.rand(3)) and drawn[1:] == (random.random(), np.random.rand())
    weights = named.state_dict()
    assert planned.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in planned.state_dict().items())

    profile = profile_step(CIFAR, 16, 32, 32)
    units = chain_of(planned)
    peaks = [
        peak_of(profile.step, MemoryPlan(tuple(profile.names.index(block[-1].name) for block in plan.blocks[:-1]))).total
        for plan in (planned.local.plan, *(plan_blocks(units, [True] * 16, 3, kind) for kind in ('stage', 'uniform')))
    ]
    assert peaks[0] == min(peaks) < max(peaks)


def test_one_block_needs_no_plan():
    assert cuts_of(backbone_of(1, {**MEMORY, 'shape': (10**6, 10**6)})) == []


CHILD = f"""\
_base_ = '{ROOT}/configs/paper/retinanet_r18_manpp_k4.py'
optim_wrapper = dict(update='immediate')
model = dict(backbone=dict(num_blocks=2, partition=dict(
    type='memory', model=_base_.model, optim_wrapper=dict(_base_.optim_wrapper, **optim_wrapper), batch=2, shape=(64, 96))))
"""


def test_a_detector_through_its_runner(tmp_path):
    (tmp_path / 'child.py').write_text(CHILD)
    written = Config.fromfile(tmp_path / 'child.py')
    written.merge_from_dict({'model.backbone.backbone.init_cfg': None})
    for model in ('model', 'model.backbone.partition.model'):
        heads = [f'{model}.bbox_head', f'{model}.backbone.local_head.bbox_head']
        widths = [f'{model}.neck.out_channels', *(f'{head}.{name}_channels' for head in heads for name in ('in', 'feat'))]
        written.merge_from_dict(dict.fromkeys(widths, 32))
    written.dump(tmp_path / 'dumped.py')
    named = Config.fromfile(tmp_path / 'dumped.py')
    made = runner(Config.fromfile(tmp_path / 'dumped.py'), tmp_path)
    assert DefaultScope.get_current_instance().instance_name == made.experiment_name
    planned = made.model
    assert len(planned.backbone.local) == 1
    named.model.backbone.partition = cuts_of(planned.backbone)
    weights = runner(named, tmp_path).model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in planned.state_dict().items())


def runner(cfg: Config, folder) -> Runner:
    for split in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    cfg.merge_from_dict({'work_dir': str(folder), 'experiment_name': f'{id(cfg)}', 'randomness': {'seed': 1}})
    made = Runner.from_cfg(cfg)
    made.model.init_weights()
    return made


@pytest.mark.parametrize(
    ('partition', 'message'),
    [
        ('memory', r"by a config: partition=dict\(type='memory', model=_base_.model"),
        ({'type': 'memory'}, 'partition: MemoryCuts requires the option model; for cuts by memory write partition='),
        ({**MEMORY, 'size': 3}, 'partition: MemoryCuts has no option size; '),
        ({**MEMORY, 'type': 'peak'}, "partition has type='peak'; "),
        ({**MEMORY, 'batch': 0}, 'batch=0'),
        ({**MEMORY, 'shape': 32}, 'shape=32: expected 2 values, each an integer >= 1'),
        ({**MEMORY, 'model': {'type': 'ImageClassifier'}}, 'not the config of a model with a backbone'),
        ({**MEMORY, 'optim_wrapper': 'SGD'}, "partition.optim_wrapper='SGD': expected a dict"),
    ],
)
def test_a_wrong_partition_is_refused_in_one_line(partition, message):
    with pytest.raises(PartitionError, match=message) as caught:
        backbone_of(3, partition)
    assert '\n' not in str(caught.value)


def test_what_is_missing_is_said():
    with pytest.raises(PartitionError, match='num_blocks is needed'):
        backbone_of(None, MEMORY)
    with pytest.raises(LocalLearningError, match='99 blocks: choose from 1 to'):
        backbone_of(99, MEMORY)
    DefaultScope._instance_dict.clear()
    with pytest.raises(LocalLearningError, match='need a default scope'):
        MODELS.build({**CIFAR.model.backbone, 'num_blocks': 3, 'partition': MEMORY})
