"""Which outputs a selectively recomputed unit saves."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmman.analysis import LiveBytes
from mmman.memory.recompute import disable_recompute_, recompute_
from mmman.memory.selective import should_save
from tests.toy import toy_batches
from tests.unit.local.test_session import toy


def test_outputs_that_are_expensive_to_recompute_are_saved():
    found = {}

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found[name] = found.get(name, False) or should_save(op, args)
            return op(*args, **(kwargs or {}))

    image, tokens = torch.randn(1, 8, 8, 8), torch.randn(1, 20, 8)
    layers = {
        '3x3': nn.Conv2d(8, 16, 3),
        'narrows': nn.Conv2d(8, 4, 1),
        'widens': nn.Conv2d(8, 32, 1),
        'depthwise': nn.Conv2d(8, 8, 5, groups=8, padding=2),
        'depthwise, costly': nn.Conv2d(8, 8, 3, groups=8),
        'transposed': nn.ConvTranspose2d(8, 8, 3),
        'linear': nn.Linear(8, 8),
        'linear without bias': nn.Linear(8, 8, bias=False),
        'linear widens': nn.Linear(8, 9),
        'norm': nn.LayerNorm(8),
        'scores': lambda x: x @ x.mT,
        'attended': lambda x: torch.rand(1, 20, 20) @ x,
        'attention': lambda x: nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3),
    }
    with Asked():
        for name, layer in layers.items():  # noqa: B007  Asked reads it
            layer(image if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else tokens)
    costly = {'3x3', 'narrows', 'depthwise', 'depthwise, costly', 'linear', 'linear without bias', 'attended', 'attention'}
    assert {name for name, is_so in found.items() if is_so} == costly


@pytest.mark.parametrize('block', ['Bottleneck', 'BasicBlock'])
def test_a_selective_unit_keeps_convolutions_but_the_widening_one(block):
    resnet = pytest.importorskip('mmpretrain.models.backbones.resnet')
    unit = getattr(resnet, block)(64, 64).double().train()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64, requires_grad=True)
    wide = x.numel() * 8
    narrow = wide if block == 'BasicBlock' else wide // 4
    alive, flops = [], []
    for selective in (True, False):
        recompute_(unit, selective)
        with LiveBytes(unit, x) as live:
            y = unit(x).sum()
            alive.append(live.current)
        with FlopCounterMode(display=False) as counter:
            y.backward()
        flops.append(counter.get_total_flops())
        disable_recompute_(unit)
        unit.zero_grad()
        x.grad = None
    assert alive[0] - alive[1] == 2 * narrow
    forward = {name: 2 * conv.weight.numel() * 2 * 64 for name, conv in unit.named_modules() if isinstance(conv, nn.Conv2d)}
    assert flops[1] == 3 * sum(forward.values())
    assert flops[0] == 2 * sum(forward.values()) + forward.get('conv3', 0)


def test_a_graph_of_selective_units_is_back_propagated_once():
    model = toy(num_blocks=1, selective_recompute=True)
    loss = model(**toy_batches(1)[0], mode='loss')['loss_ce']
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='only allowed to backward once'):
        loss.backward()
