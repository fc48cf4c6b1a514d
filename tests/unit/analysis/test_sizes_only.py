"""Steps without data: the bytes and FLOPs of the steps with data."""

import copy
from contextlib import nullcontext

import pytest
import torch

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.sizes_only import SizesOnly
from mmman.analysis.training import StepMeter
from mmman.errors import ConfigError
from tests.configs import read_config

pytestmark = pytest.mark.whole_models

pytest.importorskip('mmpretrain')
B = 'model.backbone'
SMALL_VIT = {f'{B}.backbone.arch': 'deit-tiny', f'{B}.backbone.img_size': 32, 'model.head.in_channels': 192}
SMALL_DEEPLAB = {
    'model.pretrained': None,
    f'{B}.backbone.base_channels': 8,
    f'{B}.local_head.network': {'type': 'FCNHead', 'channels': 16, 'num_convs': 1, 'concat_input': False},
    'model.decode_head': {'in_channels': 256, 'channels': 16},
    'model.auxiliary_head': {'in_channels': 128, 'channels': 16},
}
CASES = {
    'infopro': ('table1/cifar10_resnet32_k16_infopro_manpp', {}),
    'recomputed, immediate': (
        'paper/resnet32_manpp_k16_cifar10.py',
        {f'{B}.recompute': True, 'optim_wrapper.update': 'immediate'},
    ),
    'stem in parts': (
        'resnet101_manpp_k4_imagenet.py',
        {f'{B}.backbone.base_channels': 8, 'model.head.in_channels': 256, f'{B}.recompute': ['stem']},
    ),
    'ViT, Adam': ('vit-base_manpp_k6_imagenet.py', SMALL_VIT),
    'segmentor': ('paper/deeplabv3_r50_manpp_k2.py', SMALL_DEEPLAB),
}


def measured(case: str, sizes_only: SizesOnly | None) -> tuple:
    name, options = CASES[case]
    cfg = read_config(name)
    cfg.merge_from_dict(copy.deepcopy(options))
    model, optim_wrapper = build_dummy_model(cfg, 32, 32, sizes_only)
    data = random_batch(model, cfg.default_scope, 2, 32, 32)
    with sizes_only or nullcontext():
        meter = StepMeter(model, optim_wrapper, data)
        memory = meter.memory()
        return memory.peak, memory.parts, memory.flops, meter.floor()


@pytest.mark.filterwarnings('ignore:.*(build_loss|avg_non_ignore|align_corners).*:UserWarning')
@pytest.mark.parametrize('case', CASES)
def test_bytes_and_flops_are_those_with_data(case):
    assert measured(case, SizesOnly()) == measured(case, None)


def test_nothing_is_computed():
    mode = SizesOnly()
    layer = torch.nn.Linear(1 << 20, 1 << 15, device='meta')
    with mode:
        x = torch.zeros(1 << 20, 1 << 20)
        assert layer.weight.shape == (1 << 15, 1 << 20) and x.nbytes == 1 << 42
        assert (x.sum().item(), x.argmax().item()) == (1.0, 1)
        assert x[x > 0].shape == (1 << 40,) and x.T[:, x[0] > 0].shape == (1 << 20, 1 << 20)


def test_what_depends_on_data_is_refused():
    with pytest.raises(ConfigError, match='detectors, .* are measured with data'), SizesOnly():
        torch.zeros(3).nonzero()
