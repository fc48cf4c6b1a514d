import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmman import MomentumTransfer
from mmman.errors import ConfigError
from mmman.partition import Feature
from mmman.partition.calls import call_on_map, call_on_tokens
from mmman.partition.chain import UnitSequence
from tests.toy import ToyUnit


@pytest.fixture
def source():
    torch.manual_seed(0)
    return ToyUnit(4, 8, stride=2).double()


X = torch.randn(2, 4, 6, 6, dtype=torch.float64)


def test_the_rows_of_the_ablation(source):
    y = source(X)
    assert MomentumTransfer(source, Feature(8, 2), ema=False, bias=False, scale=False)(X) is X
    assert torch.equal(MomentumTransfer(source, Feature(8, 2), bias=False, scale=False)(X), y)
    assert torch.equal(MomentumTransfer(source, Feature(8, 2), scale=False)(X), y + y)
    transfer = MomentumTransfer(source, Feature(8, 2))
    assert torch.equal(transfer(X), y + y)
    torch.nn.init.constant_(transfer.delta, 0.25)
    transfer.bias.bn.bias.data += 1
    assert torch.equal(transfer(X), 1.25 * transfer.momentum(X) + 0.75 * transfer.bias(X))


def test_gradients_flow_through_the_copy_but_not_into_it(source):
    transfer = MomentumTransfer(source, Feature(8, 2)).double()
    x = X.clone().requires_grad_()
    transfer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in transfer.momentum.parameters())
    assert all(p.grad is not None for p in transfer.bias.parameters())
    assert source.conv.weight.grad is None


def test_the_scale_follows_the_paper_and_decays_to_neutral(source):
    """dy/ds = E - B, and (2 - s) is the factor of the bias's gradient (Eq. 6)."""
    transfer = MomentumTransfer(source, Feature(8, 2)).double()
    transfer.bias.conv.weight.data *= 2
    torch.nn.init.constant_(transfer.delta, 0.5)
    transfer(X).sum().backward()
    difference = (transfer.momentum(X) - transfer.bias(X)).sum()
    torch.testing.assert_close(transfer.delta.grad, difference.detach())
    grad = transfer.bias.conv.weight.grad
    alone = torch.autograd.grad(transfer.bias(X).sum(), transfer.bias.conv.weight)[0]
    torch.testing.assert_close(grad, 0.5 * alone)
    transfer.delta.data.zero_()
    assert transfer.s == 1


def test_the_releases_scale(source):
    transfer = MomentumTransfer(source, Feature(8, 2), scale='release')
    assert transfer.s == 1
    transfer.rho.data.fill_(0.25)  # what decay does: towards the momentum copy alone
    assert transfer.s == 1.75
    assert 'delta' not in transfer.state_dict()


def test_channel_bias(source):
    transfer = MomentumTransfer(source, Feature(8, 2), bias='channel').double()
    assert torch.equal(transfer(X), source(X))
    transfer.channel_bias.data += 3
    transfer.delta.data += 0.5
    torch.testing.assert_close(transfer(X), 1.5 * source(X) + 0.5 * 3)
    assert sum(p.numel() for p in transfer.parameters() if p.requires_grad) == 8 + 1


def test_depthwise_bias(source):
    transfer = MomentumTransfer(source, Feature(8, 2), bias='depthwise').double()
    assert torch.equal(transfer(X), source(X))
    transfer.depthwise_bias.data.normal_()
    transfer.delta.data += 0.5
    y = source(X)
    expected = 1.5 * y + 0.5 * F.conv2d(y, transfer.depthwise_bias, padding=1, groups=8)
    torch.testing.assert_close(transfer(X), expected)
    assert sum(p.numel() for p in transfer.parameters() if p.requires_grad) == 8 * 9 + 1
    without_scale = MomentumTransfer(source, Feature(8, 2), bias='depthwise', scale=False).double()
    without_scale.load_state_dict(transfer.state_dict(), strict=False)
    torch.testing.assert_close(without_scale(X), y + F.conv2d(y, transfer.depthwise_bias, padding=1, groups=8))


def test_depthwise_bias_of_tokens_is_that_of_their_map():
    source = UnitSequence([nn.Conv2d(8, 8, 2, 2), nn.LayerNorm(8)], (_halve, call_on_tokens)).double()
    transfer = MomentumTransfer(source, Feature(8, 4, 0), bias='depthwise', has_grid=True).double()
    transfer.depthwise_bias.data.normal_()
    x = torch.randn(2, 24, 8, dtype=torch.double)
    y = source(x, (4, 6))
    assert y.shape == (2, 6, 8)
    as_map = y.transpose(1, 2).reshape(2, 8, 2, 3)
    expected = as_map + F.conv2d(as_map, transfer.depthwise_bias, padding=1, groups=8)
    torch.testing.assert_close(transfer(x, (4, 6)), expected.flatten(2).transpose(1, 2))


def _halve(module, x, grid):
    return call_on_map(module, x, grid)[0], (grid[0] // 2, grid[1] // 2)


@pytest.mark.parametrize('options', [{'extra_tokens': 1}, {'extra_tokens': 0}])
def test_depthwise_bias_is_for_grids(source, options):
    feature = Feature(8, 2, **options)
    with pytest.raises(
        ConfigError, match="transfer.bias='depthwise' requires feature maps: for tokens choose 'channel' or 'unit'"
    ):
        MomentumTransfer(source, feature, bias='depthwise', has_grid=bool(feature.extra_tokens))


def test_sync_copies_and_update_is_lerp(source):
    transfer = MomentumTransfer(source, Feature(8, 2)).double()
    assert not transfer.is_initialized
    source.conv.weight.data += 1
    source.bn.running_mean += 2
    transfer.init_from_(source)
    assert transfer.is_initialized
    for copied in (transfer.momentum, transfer.bias):
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in copied.state_dict().items())

    before = {name: value.clone() for name, value in transfer.state_dict().items()}
    for value in source.state_dict().values():
        value += 1
    transfer.ema_update_(source, 0.9)
    for name, value in transfer.state_dict().items():
        expected = before[name]
        if name.startswith('momentum') and value.is_floating_point():
            expected = torch.lerp(expected, source.state_dict()[name.removeprefix('momentum.')], 1 - 0.9)
        assert torch.equal(value, expected), name
    assert 'momentum.bn.running_mean' in before and 'momentum.bn.num_batches_tracked' in before


def test_what_is_no_state_stays(source):
    """A mask, say: lerp would make NaN of minus infinity."""
    source.register_buffer('mask', torch.tensor([0.0, -torch.inf]), persistent=False)
    transfer = MomentumTransfer(source, Feature(8, 2))
    transfer.ema_update_(source, 0.9)
    assert torch.equal(transfer.momentum.mask, source.mask)


def test_copies_follow_the_modes_of_their_source(source):
    transfer = MomentumTransfer(source, Feature(8, 2))
    source.bn.eval()
    transfer.sync_mode_(source)
    assert not transfer.momentum.bn.training and not transfer.bias.bn.training and transfer.bias.conv.training


def test_copies_from_a_state_dict_are_kept_where_asked(source):
    transfer, other = MomentumTransfer(source, Feature(8, 2)), MomentumTransfer(source, Feature(8, 2))
    transfer.momentum.conv.weight.data += 1
    partial = {name: value for name, value in transfer.state_dict().items() if not name.startswith('bias')}
    other.load_state_dict(partial, strict=False)
    assert not other.is_loaded
    other.load_state_dict(transfer.state_dict())
    assert other.is_loaded and not other.is_initialized
    other.init_from_(source, keep_loaded=True)
    assert other.is_initialized and torch.equal(other.momentum.conv.weight, transfer.momentum.conv.weight)
    other.init_from_(source)
    assert torch.equal(other.momentum.conv.weight, source.conv.weight)
    assert MomentumTransfer(source, Feature(8, 2), ema=False, bias=False, scale=False).is_initialized


@pytest.mark.parametrize('changed', [False, True])
def test_constant_buffers_may_be_missing_from_a_state_dict(source, changed):
    transfer, other = MomentumTransfer(source, Feature(8, 2)), MomentumTransfer(source, Feature(8, 2))
    transfer.momentum.conv.weight.data += 1
    source.bn.running_mean += changed
    parameters = {name: value for name, value in transfer.state_dict().items() if '.running_' not in name}
    other.load_state_dict(parameters, strict=False)
    other.init_from_(source, keep_loaded=True)
    expected = source if changed else transfer.momentum
    assert torch.equal(other.momentum.conv.weight, expected.conv.weight)
    assert torch.equal(other.momentum.bn.running_mean, expected.bn.running_mean)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'bias': 'block'}, "bias='block': expected 'unit', 'depthwise', 'channel' or False"),
        ({'scale': 'paper'}, "scale='paper': expected True, False or 'release'"),
        ({'scale': 1}, "scale=1: expected True, False or 'release'"),
        ({'ema': False}, 'set ema=True and a bias'),
        ({'bias': False}, 'set ema=True and a bias'),
        ({'ema': False, 'bias': 'channel', 'scale': False}, 'set ema=True'),
        ({'ema': False, 'bias': 'depthwise', 'scale': False}, 'set ema=True'),
        ({'source_unit': 'last'}, "source_unit='last': expected 'next' or 'next_stage' or a list of strings"),
        ({'source_unit': 3}, "source_unit=3: expected 'next'"),
        (
            {'ema': False, 'bias': False, 'scale': False, 'source_unit': 'next_stage'},
            'names the unit that is copied: set ema=True',
        ),
    ],
)
def test_meaningless_combinations(source, options, message):
    with pytest.raises(ConfigError, match=message):
        MomentumTransfer(source, Feature(8, 2), **options)
