"""A part of the model on a few images at a time: sums of losses, gradients that are attached, and attributes that return."""

from types import SimpleNamespace

import pytest
import torch

from mmman.errors import ConfigError
from mmman.memory.chunks import attach_grads, replaced, run_in_chunks

ONE = torch.tensor(1.0, dtype=torch.float64)


def test_the_scale_of_a_loss_scaler_is_used_inside():
    """Half-precision gradients of chunks would underflow without it; what comes out is scaled once."""
    seen = []
    layer = torch.nn.Linear(3, 1, dtype=torch.float64)
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)

    def compute(leaves, span):
        loss = layer(leaves[0]).square().sum()
        loss.register_hook(lambda grad: seen.append(grad.item()))
        return loss, {'loss': loss}

    losses = run_in_chunks(compute, [x], [*layer.parameters()], 1, torch.tensor(1024.0, dtype=torch.float64))
    (losses['loss'] * 1024).backward()
    assert seen == [1024.0] * 4
    ours = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    (layer(x).square().sum() * 1024).backward()
    for got, expected in zip(ours, (x.grad, layer.weight.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize('size', [1, 2, 3, 7])
def test_losses_and_gradients_are_those_of_the_whole_batch(size):
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(3, 2).double(), torch.nn.Linear(1, 1)
    x, fixed = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.randn(7, 2, dtype=torch.float64)
    spans = []

    def losses_of(features, start=0):
        y = layer(features[0])
        return {'loss_a': y.square().sum(), 'loss_b': (y * features[1]).sum()}

    def compute(leaves, span):
        spans.append((span.start, span.stop))
        assert [leaf.requires_grad for leaf in leaves] == [True, False]
        losses = losses_of(leaves)
        return losses['loss_a'] + losses['loss_b'], losses

    ours = run_in_chunks(compute, [x, fixed], [*layer.parameters(), *unused.parameters()], size, ONE)
    assert spans == [(start, min(start + size, 7)) for start in range(0, 7, size)]
    assert x.grad is layer.weight.grad is None  # until the returned losses are back-propagated
    sum(ours.values()).backward()
    found = x.grad, layer.weight.grad, layer.bias.grad
    assert unused.weight.grad is None
    x.grad = layer.weight.grad = layer.bias.grad = None
    theirs = losses_of([x, fixed])
    sum(theirs.values()).backward()
    assert {name: loss.item() for name, loss in ours.items()} == pytest.approx({k: v.item() for k, v in theirs.items()})
    for got, expected in zip(found, (x.grad, layer.weight.grad, layer.bias.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_attached_gradients_are_back_propagated_once():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = attach_grads({'a': ONE.clone(), 'b': 2 * ONE}, 4 * ONE, [torch.full((2,), 8.0, dtype=torch.float64)], [x])
    total = 3 * (losses['a'] + losses['b'])
    total.backward(retain_graph=True)
    assert total.item() == 9 and x.grad.tolist() == [6.0, 6.0]  # 8 * 3 / 4
    with pytest.raises(ConfigError, match='only once: to do it again set images_per_chunk=None'):
        total.backward()


@pytest.mark.parametrize('own', [{}, {'value': 1}])
def test_a_replaced_attribute_returns_also_after_an_error(own):
    owner = SimpleNamespace(**own)
    with pytest.raises(ZeroDivisionError), replaced(owner, 'value', 2):
        assert owner.value == 2
        raise ZeroDivisionError
    assert vars(owner) == own
