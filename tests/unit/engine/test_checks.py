"""DDP as local learning needs it; a group of one process is enough to be refused in."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel

from mmman import EMABiasHook
from mmman.engine.checks import check_model
from mmman.errors import ConfigError
from tests.unit.local.test_session import step, toy, wrapper


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model, **options):
    return MMDistributedDataParallel(model, **options)


def test_ddp_that_finds_unused_parameters_trains_as_one_process(group):
    plain, model = toy(), toy()
    parallel = ddp(model, find_unused_parameters=True)
    ours, theirs = wrapper(parallel, accumulative_counts=2), wrapper(plain, accumulative_counts=2)
    for _ in range(4):
        step(parallel, ours)
        step(plain, theirs)
    assert ours.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, r"model_wrapper_cfg = dict\(type='mmman.LocalDistributedDataParallel'\)"),
        ({'find_unused_parameters': True, 'static_graph': True}, 'static_graph=True leaves'),
    ],
)
def test_ddp_options_that_lose_gradients_are_refused(group, options, message):
    model = ddp(toy(), **options)
    with pytest.raises(ConfigError, match=message):
        step(model, wrapper(model))


def test_stock_ddp_refuses_immediate_updates(group):
    model = ddp(toy(), find_unused_parameters=True)
    with pytest.raises(ConfigError, match="after forward, but update='immediate' steps during it"):
        step(model, wrapper(model, update='immediate'))


def test_flexible_runner_is_refused():
    with pytest.raises(ConfigError, match=r'strategies \(FSDP, DeepSpeed'):
        EMABiasHook().before_run(type('FlexibleRunner', (), {})())


def test_frozen_local_heads_are_refused():
    """An adapter around the localised backbone (LoRAModel) freezes all but its own layers."""
    model = toy(num_blocks=2)
    model.backbone.local.requires_grad_(False)
    with pytest.raises(ConfigError, match='the local head after layer1.1 is frozen.* no wrapper that freezes .LoRAModel.'):
        step(model, wrapper(model))


def test_heads_that_another_stage_of_a_pipeline_trains_may_be_frozen():
    model = toy(num_blocks=3)
    heads = [*model.backbone.local.values()]
    heads[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=f'the local head after {heads[1].unit} is frozen'):
        check_model(model, 'synchronous')
    model.backbone.local.trained_index = 0
    check_model(model, 'synchronous')
