"""Strides that don't fit the feature maps are refused in the first forward pass, and only looked at there."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmman.engine.stride_check import check_strides_once
from mmman.errors import ConfigError

STRIDES = [(8, 8), (16, 16), (32, 32), (64, 64)]


class Pool(nn.Module):
    """Maps of the given strides."""

    def __init__(self, strides):
        super().__init__()
        self.strides = strides

    def forward(self, x):
        return tuple(nn.functional.avg_pool2d(x, stride, ceil_mode=True) for stride in self.strides)


class Detector(nn.Module):
    def __init__(self, maps=(8, 16, 32, 64), anchors=(), regions=None):
        super().__init__()
        self.backbone, self.neck = nn.Identity(), Pool(maps)
        head = nn.Module()
        head.prior_generator = SimpleNamespace(strides=anchors or STRIDES)
        setattr(self, 'bbox_head' if regions is None else 'rpn_head', head)
        if regions is not None:
            self.roi_head = nn.Module()
            self.roi_head.bbox_roi_extractor = nn.Module()
            self.roi_head.bbox_roi_extractor.featmap_strides = regions

    def forward(self, x):
        return self.neck(self.backbone(x))


@pytest.mark.parametrize('size', [(64, 96), (100, 52), (33, 31)])
@pytest.mark.parametrize('options', [{}, {'regions': [8, 16, 32]}])
def test_what_fits_passes_and_leaves_no_hook(options, size):
    model = Detector(**options)
    check_strides_once(model)
    for _ in range(2):
        model(torch.zeros(1, 3, *size))
    assert not model.neck._forward_hooks and not model.backbone._forward_pre_hooks


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'anchors': STRIDES[1:]}, r'model\.bbox_head: strides of the SimpleNamespace: level 0 has stride 16.* about 8'),
        (
            {'maps': (4, 8, 16, 32), 'regions': [4, 8, 16]},
            r'model\.rpn_head: .*level 0 has stride 8, but its map of 16x24 .* about 4',
        ),
        ({'regions': [4, 8, 16]}, r'model\.roi_head\.bbox_roi_extractor\.featmap_strides: level 0 has stride 4.*out_indices'),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    model = Detector(**options)
    check_strides_once(model)
    with pytest.raises(ConfigError, match=message):
        model(torch.zeros(1, 3, 64, 96))


def test_other_models_are_not_checked():
    model = nn.Module()
    model.backbone = nn.Identity()
    check_strides_once(model)
    assert not model.backbone._forward_pre_hooks
