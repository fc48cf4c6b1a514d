"""The stem in chunks of the batch: outputs, gradients and running statistics are those of the batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmman.analysis import LiveBytes
from mmman.memory.stem import StemInChunks, run_stem


def post(z):
    return F.max_pool2d(z.relu(), 3, 2, 1)


def stem(mode='train', momentum=0.1, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8, momentum=momentum)).to(dtype)
    nn.init.uniform_(layers[1].weight, -1, 1)
    nn.init.uniform_(layers[1].bias)
    layers[1].running_mean += 0.1
    return layers.train(mode == 'train')


def run(layers, x, whole):
    x = x.clone().requires_grad_()
    out = post(layers(x)) if whole else run_stem(x, *layers, post)
    weights = torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()]


@pytest.mark.parametrize('count', [4, 11])  # 11: chunks of two, and a last one of one
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_as_the_batch(mode, momentum, count):
    x = torch.randn(count, 3, 33, 40, dtype=torch.float64)
    first, second = stem(mode, momentum), stem(mode, momentum)
    for _ in range(2):
        for layers in (first, second):
            layers.zero_grad()
        for ours, theirs in zip(run(first, x, False), run(second, x, True), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_under_autocast():
    x = torch.randn(4, 3, 33, 40)
    layers = stem(dtype=torch.float32)
    other = copy.deepcopy(layers)
    with torch.autocast('cpu', torch.bfloat16):
        ours, theirs = run_stem(x, *layers, post), post(other(x))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for a, b in zip(layers.parameters(), other.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 2e-2 * b.grad.norm()


@pytest.mark.parametrize('images', [1, 3])
def test_memory_is_that_of_an_eighth(images):
    x, layers = torch.randn(8 * images, 3, 64, 64), stem(dtype=torch.float32)
    peaks = []
    for whole in (True, False):
        with LiveBytes(x, layers) as live:
            start = live.current
            out = post(layers(x)) if whole else run_stem(x, *layers, post)
            out.sum().backward()
            peaks.append(live.peak - start)
            del out
    plane = images * 8 * 32 * 32 * 4  # the largest map of an eighth of the batch
    pooled = 8 * plane // 4
    assert peaks[0] > 8 * 3 * plane
    assert peaks[1] < 2 * pooled + 8 * plane


def test_an_error_inside_the_stem_leaves_nothing_behind():
    """Neither norm nor pooling is left out of the next forward pass, whoever runs it."""
    pytest.importorskip('mmdet')
    from mmdet.models.backbones import ResNet

    def build():
        torch.manual_seed(0)
        return ResNet(18, base_channels=8, frozen_stages=-1, norm_eval=False).double()

    plain, chunked, x = build(), build(), torch.rand(4, 3, 64, 64, dtype=torch.float64)
    plain.train(), chunked.train()
    StemInChunks(chunked, ('conv1', 'bn1', 'relu', 'maxpool')).install_()

    def fail(*_):
        handle.remove()
        raise RuntimeError('between convolution and norm')

    handle = chunked.bn1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='between convolution and norm'):
        chunked(x)
    chunked.bn1.load_state_dict(plain.bn1.state_dict())  # running statistics are updated with the convolution
    with torch.no_grad():  # the plain forward
        for ours, theirs in zip(chunked(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(chunked(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    copy.deepcopy(chunked)
