"""FLOPs by operator, from torch's formulas, with corrections for grouped convolutions' gradients and attention on a CPU."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten


def _convolution_backward(
    grad, x, weight, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted, **_
) -> int:
    """The gradient of the input and the gradient of the weight each cost as much as the forward pass."""
    positions = (x if transposed else grad)[2:]
    return 2 * x[0] * prod(positions) * prod(weight) * sum(wanted[:2])


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_CORRECTED = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FORMULAS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in _CORRECTED.items()}}


def flops_of(operator: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Tensor | tuple) -> int:
    """FLOPs of one call of an operator. 0 for operators other than matrix products, convolutions and attention."""
    formula = _FORMULAS.get(operator._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)
