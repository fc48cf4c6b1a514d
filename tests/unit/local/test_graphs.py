"""A step as recorded graphs: on whatever data they run, they train what the step without them trains."""

import pytest
import torch
from mmengine.config import Config

from mmman.analysis.training import StepMeter
from mmman.analysis.trial import build_trial, random_batch
from mmman.engine import optim_wrapper as wrappers
from mmman.local.focal_loss import fused_focal_loss
from mmman.local.graphs import StepGraphs
from tests.conftest import ROOT
from tests.recorder import CPURecorder

pytest.importorskip('mmdet')


@pytest.fixture
def recorder(monkeypatch):
    """Graphs on the CPU."""
    recorder = CPURecorder()

    def step_graphs(wrapper, model):
        dense = wrapper._dense or wrappers.DenseLoss(model, 99, wrapper._scaled)
        local, (backward, stepped) = wrapper._backbone.local, (wrapper._back_propagate, wrapper._block_done)
        return StepGraphs(dense, local, backward, stepped, recorder)

    monkeypatch.setattr(wrappers.LocalLearningOptimWrapper, '_step_graphs', step_graphs)
    return recorder


def trained(sizes, config='light/retinanet_r18_k4.py', **options):
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.merge_from_dict({'model.backbone.backbone.norm_eval': False, **options})
    model, optim_wrapper = build_trial(cfg, 64, 96)
    for group in optim_wrapper.optimizer.param_groups:
        group['lr'] = 1e-4
    logs = []
    for seed, size in enumerate(sizes):
        torch.manual_seed(seed)
        meter = StepMeter.__new__(StepMeter)
        meter.model, meter.optim_wrapper, meter._heads = model, optim_wrapper, [*model.backbone.local.values()]
        meter.data = random_batch(model, 'mmdet', 3, *size)
        meter.step()
        logs.append({k: v.current() for k, v in optim_wrapper.message_hub.log_scalars.items() if 'local/' in k})
    return model.state_dict(), logs


@pytest.mark.parametrize('options', [{}, {'optim_wrapper.update': 'synchronous', 'optim_wrapper.images_per_chunk': None}])
def test_trains_what_is_trained_without(options, recorder):
    sizes = [(64, 96), (64, 96), (64, 96), (96, 64), (64, 96), (96, 64)]
    with fused_focal_loss():
        expected, logs = trained(sizes, **options)
    with fused_focal_loss():  # in the first step too, which is none of a graph
        got, own = trained(sizes, **options, **{'optim_wrapper.cuda_graphs': True})
    assert recorder.recordings == 16
    assert own == logs
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
