"""Predicted peaks against those of real training steps, in live bytes on the CPU."""

import copy
from dataclasses import replace

import pytest
from mmengine.config import Config

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.training import StepMeter
from mmman.errors import ConfigError
from mmman.planning.costs import MemoryPlan, RecomputeMode, peak_of
from mmman.planning.profile import Profile, profile_step
from mmman.planning.search import smallest_peak
from tests.configs import read_config

pytestmark = pytest.mark.whole_models


def load(name: str, **options: object) -> Config:
    cfg = read_config(name)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def measured(profile: Profile, plan: MemoryPlan) -> StepMeter:
    cfg, (batch, _, height, width) = copy.deepcopy(profile.config), profile.shape
    cfg.model.backbone.update(profile.options(plan))
    model, optim_wrapper = build_dummy_model(cfg, height, width)
    return StepMeter(model, optim_wrapper, random_batch(model, cfg.default_scope, batch, height, width))


HEADS = ('bbox_head', 'backbone__local_head__bbox_head')
DENSE = [f'{head}__{name}' for head in HEADS for name in ('in_channels', 'feat_channels')]
NARROW = {f'model__{part}': 32 for part in ('neck__out_channels', *DENSE)}
FROZEN = {
    'model__backbone__backbone__frozen_stages': 1,
    'optim_wrapper__optimizer': {'_delete_': True, 'type': 'SGD', 'lr': 1.0, 'weight_decay': 0.1},
}
UNITS = ['stem', *(f'layer{stage}.{unit}' for stage in (1, 2, 3, 4) for unit in (0, 1))]
LEAN = {
    'model__backbone__recompute': UNITS,
    'model__backbone__backbone__norm_eval': False,
    'optim_wrapper__images_per_chunk': 1,
    'optim_wrapper__update': 'immediate',
}
R18 = {
    'model__backbone__backbone__depth': 18,
    'model__backbone__recompute': ['stem'],
    'model__head__in_channels': 512,
    'optim_wrapper__update': 'immediate',
}
SELECTIVE = {'model__backbone__recompute': ['stem'], 'model__backbone__selective_recompute': UNITS[1:]}
SELECTIVE |= {'model__backbone__backbone__depth': 50}
CASES = {
    'batch': ('paper/resnet32_manpp_k16_cifar10.py', (12, 32, 32), 6, {}),
    'levels': ('paper/retinanet_r18_manpp_k4.py', (1, 256, 384), 3, NARROW),
    'frozen units, SGD': ('paper/retinanet_r18_manpp_k4.py', (1, 256, 384), 2, {**NARROW, **FROZEN}),
    'image by image': ('paper/retinanet_r18_manpp_k4.py', (3, 256, 320), 2, {**NARROW, **LEAN}),
    'stem by image': ('paper/resnet101_manpp_k4_imagenet.py', (4, 128, 128), 3, R18),
    'selective': ('paper/resnet101_manpp_k4_imagenet.py', (4, 128, 128), 3, SELECTIVE),
    'tokens': ('table2/vit-tiny_k4_manpp', (3, 224, 224), 4, {}),
}


@pytest.mark.parametrize('case', CASES)
def test_peak_is_that_of_a_real_step(case):
    name, shape, blocks, options = CASES[case]
    profile = profile_step(load(name, **options), *shape)
    for plan in (smallest_peak(profile.step, blocks), MemoryPlan()):
        assert peak_of(profile.step, plan).total == pytest.approx(measured(profile, plan).memory().peak, rel=0.01)


def test_the_plan_chooses_what_each_block_recomputes():
    """Peak and FLOPs of a plan in which they differ; those of plans without a choice in which all do the same."""
    name, shape, _, options = CASES['stem by image']  # whose own recompute doesn't count
    plan = MemoryPlan((2, 5), (RecomputeMode.FULL, RecomputeMode.NONE, RecomputeMode.SELECTIVE))
    profile = profile_step(load(name, **options), *shape, may_recompute=True)
    chosen = profile.options(plan)
    assert (chosen['recompute'], chosen['selective_recompute']) == (['stem', 'layer1'], ['layer3.1', 'layer4'])
    meter = measured(profile, plan)
    assert peak_of(profile.step, plan).total == pytest.approx(meter.memory().peak, rel=0.01)
    stock = measured(profile, MemoryPlan()).memory().flops
    assert profile.step.overhead(plan) == pytest.approx(meter.memory().flops / stock - 1, abs=0.04)
    fixed = {
        RecomputeMode.NONE: {'recompute': False},
        RecomputeMode.SELECTIVE: {'recompute': ['stem'], 'selective_recompute': UNITS[1:]},
        RecomputeMode.FULL: {'recompute': UNITS},
    }
    for mode, recompute in fixed.items():
        options |= {f'model__backbone__{key}': value for key, value in recompute.items()}
        step = profile_step(load(name, **options), *shape).step
        assert peak_of(step, MemoryPlan((2, 5))) == peak_of(profile.step, MemoryPlan((2, 5), (mode,) * 3))
        options.pop('model__backbone__selective_recompute', None)


def test_outputs_of_recomputed_units_that_something_holds_are_counted():
    """The input of a block's last unit, say, while that one runs backward: in end-to-end training nothing holds it."""
    options = {'model__backbone__recompute': True, 'model__backbone__transfer__bias': 'depthwise'}  # local heads below that
    profile = profile_step(load('paper/resnet32_manpp_k16_cifar10.py', **options), 12, 32, 32)
    for cuts, moment in (((5,), 'block 1, backward'), ((3, 6), 'block 2, backward')):
        predicted = peak_of(profile.step, MemoryPlan(cuts))
        assert predicted.moment == moment
        assert predicted.total == pytest.approx(measured(profile, MemoryPlan(cuts)).memory().peak, rel=1e-4)


def test_what_is_computed_twice_is_overhead():
    """Relative to the stock step, whose peak is told as well."""
    profile = profile_step(load('paper/resnet32_manpp_k16_cifar10.py', model__backbone__recompute=True), 4, 32, 32)
    plan = MemoryPlan((3, 9))
    stock = measured(
        replace(profile, config=load('paper/resnet32_manpp_k16_cifar10.py', model__backbone__num_blocks=1)), MemoryPlan()
    )
    assert profile.step.overhead(plan) == pytest.approx(
        measured(profile, plan).memory().flops / stock.memory().flops - 1, abs=0.04
    )
    assert profile.whole.total == pytest.approx(stock.memory().peak, rel=0.01)


def test_flops_are_those_of_a_real_step():
    """A block's first unit sends no gradient further, which is not told apart: a few per cent more than there are."""
    profile = profile_step(load('paper/resnet32_manpp_k16_cifar10.py'), 4, 32, 32)
    plan = MemoryPlan((3, 9))
    whole = measured(profile, MemoryPlan()).memory().flops
    assert profile.step.overhead(plan) == pytest.approx(measured(profile, plan).memory().flops / whole - 1, abs=0.04)
    units = sum(unit.flops for unit in profile.step.units)
    assert units + profile.step.task.flops == pytest.approx(whole, rel=1e-3)


def test_a_config_without_local_heads_is_refused():
    cfg = load('paper/retinanet_r18_e2e.py')
    with pytest.raises(ConfigError, match='fit_memory'):
        profile_step(cfg, 1, 64, 64)
