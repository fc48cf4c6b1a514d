"""The momentum transfer of MAN++: gives a local head information from the next block, or from a later one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.options import checked
from mmman.partition import Feature
from mmman.partition.calls import Grid, to_map, to_tokens
from mmman.partition.chain import run_unit


@checked('model.backbone.transfer', injected=('source', 'feature', 'has_grid'))
class MomentumTransfer(BaseModule):
    """``y = s * E(x) + (2 - s) * B(x)`` on the output x of block j (MAN++, Eq. 6-7).

    E is a momentum copy of the first unit of block j+1: gradients flow through it to x, the optimizer never trains it, and
    :meth:`ema_update_` moves it towards its source after every optimizer step. B is the learnable bias, trained by the local
    loss only. s = 1 + delta is a learnable scalar, so weight decay pulls s towards 1. The paper's ablation has the rows
    ``(ema, bias, scale)`` = ``(False, False, False)``: y = x; ``(True, False, False)``: y = E(x);
    ``(True, 'unit', False)``: y = E(x) + B(x), which is MAN; ``(True, 'unit', True)``: MAN++.

    Args:
        source: The unit that ``source_unit`` names. It is copied; no reference is kept.
        feature: The shape of the unit's output, used by the biases that are not a copy of the unit.
        ema: Whether to use E.
        bias: ``'unit'``: B is a trainable copy of the unit (the paper's experiments). ``'depthwise'``: B(x) is a 3x3 depthwise
            convolution of E(x), initialised to zero, for feature maps, and tokens with a grid (Swin, PVT). ``'channel'``: B(x)
            is one learnable value per output channel (the paper's cost model), initialised to zero. It is only for local heads
            that set :attr:`mmman.LocalHead.supports_channel_bias`, because a convolution with BatchNorm removes it together
            with the scale. ``False``: no B.
        scale: ``True``: learnable s = 1 + delta. ``'release'``: s = 2 - rho with rho initialised to 1, as the authors' code
            stores it, so weight decay pulls s towards 2, E alone. ``False``: s = 1.
        source_unit: The unit that E and B copy; it must take the shape of x. ``'next'``: the first unit of block j+1.
            ``'next_stage'``: the first unit of the next stage; in the last stage as ``'next'``. A list of names: the first of
            these units that follows block j.
        has_grid: Whether units take the grid of their input (:class:`mmman.partition.Chain`).

    Raises:
        ConfigError: The options contradict each other.
    """

    def __init__(
        self,
        source: nn.Module,
        feature: Feature,
        ema: bool = True,
        bias: Literal['unit', 'depthwise', 'channel', False] = 'unit',
        scale: Literal[True, False, 'release'] = True,
        source_unit: Literal['next', 'next_stage'] | Sequence[str] = 'next',
        has_grid: bool = False,
    ) -> None:
        super().__init__()
        check_transfer_options(ema, bias, scale, source_unit)
        if bias == 'depthwise' and (feature.extra_tokens or (feature.extra_tokens == 0 and not has_grid)):
            raise ConfigError("transfer.bias='depthwise' requires feature maps: for tokens choose 'channel' or 'unit'")
        self.momentum = copy.deepcopy(source).requires_grad_(False) if ema else None
        self.bias = copy.deepcopy(source) if bias == 'unit' else None
        trailing = (1, 1) if feature.extra_tokens is None else ()
        self.channel_bias = nn.Parameter(torch.zeros(feature.channels, *trailing)) if bias == 'channel' else None
        # a parameter, not a module: the initialisation of a local head's convolutions leaves it at zero
        self.depthwise_bias = nn.Parameter(torch.zeros(feature.channels, 1, 3, 3)) if bias == 'depthwise' else None
        self.delta = nn.Parameter(torch.zeros(())) if scale is True else None
        self.rho = nn.Parameter(torch.ones(())) if scale == 'release' else None
        self.is_loaded = False  # the last loaded state dict contained the copies' parameters
        self._missing_buffers: list[str] = []  # those that this state dict lacked
        self.is_initialized = not self.copies  # init_from_ was called, or there are no copies

    @property
    def s(self) -> Tensor | None:
        """The scale s, a scalar; None if it is not learnable."""
        if self.delta is not None:
            return 1 + self.delta
        return None if self.rho is None else 2 - self.rho

    def forward(self, x: Tensor, *hw_shape: Grid, run_copy: Callable[..., Tensor] | None = None) -> Tensor:
        """Compute the task head's input from the output x of block j.

        Args:
            x: (B, C, H, W) or (B, L, C).
            hw_shape: Height and width of x in patches, if the backbone's units take them.
            run_copy: Called as ``run_copy(copy, x, *hw_shape)`` in place of ``copy(x, *hw_shape)``, where part of the output is
                enough.

        Returns:
            Shaped as the unit's output, or as the result of ``run_copy``.
        """
        if self.depthwise_bias is not None:
            return self._with_depthwise_bias(*run_unit(self.momentum, x, *hw_shape))
        terms = [copied(x, *hw_shape) if run_copy is None else run_copy(copied, x, *hw_shape) for copied in self.copies]
        if self.channel_bias is not None:
            terms.append(self.channel_bias)
        if not terms:
            return x
        if (s := self.s) is not None:
            return s * terms[0] + (2 - s) * terms[1]
        return sum(terms[1:], terms[0])

    def _with_depthwise_bias(self, y: Tensor, *grid: Grid) -> Tensor:
        """``s * y + (2 - s) * depthwise(y)`` of E's output, as one convolution: only ``y`` is saved for the backward pass."""
        s = 1 if self.s is None else self.s
        identity = F.pad(y.new_ones(1, 1, dtype=self.depthwise_bias.dtype), (1, 1, 1, 1))
        kernel = s * identity + (2 - s) * self.depthwise_bias
        biased = F.conv2d(to_map(y, *grid), kernel, padding=1, groups=len(self.depthwise_bias))
        return biased if y.dim() == 4 else to_tokens(biased)

    @property
    def copies(self) -> list[nn.Module]:
        """E and B, if they exist and are copies of the unit."""
        return [module for module in (self.momentum, self.bias) if module is not None]

    @torch.no_grad()
    def init_from_(self, source: nn.Module, keep_loaded: bool = False) -> None:
        """Make E and B exact copies of the current ``source``. Call this once, when training starts.

        Args:
            source: The unit that the transfer copies.
            keep_loaded: Leave E and B unchanged if the last loaded state dict contained all of their tensors. Buffers that
                equal those of ``source`` may be missing: some backbones (SwinV2) drop constant buffers when they load.
        """
        if not (keep_loaded and self.is_loaded and self._has_buffers_of(source)):
            for module in self.copies:
                module.load_state_dict(source.state_dict())
        self.is_initialized = True

    @torch.no_grad()
    def ema_update_(self, source: nn.Module | Mapping[str, Tensor], momentum: float) -> None:
        """``E <- lerp(E, source, 1 - momentum)`` over all floating-point parameters and buffers.

        Args:
            source: The unit that the transfer copies, or its state dict.
            momentum: m, from 0 to 1.
        """
        if self.momentum is None:
            return
        if isinstance(source, nn.Module):
            ours, theirs = _float_tensors(self.momentum), _float_tensors(source)
        else:
            names = [name for name, value in self.momentum.state_dict().items() if value.is_floating_point()]
            ours, theirs = ([own[name] for name in names] for own in (self.momentum.state_dict(), source))
        torch._foreach_lerp_(ours, theirs, 1 - momentum)

    def sync_mode_(self, source: nn.Module) -> None:
        """Set every layer of E and B to the train/eval mode of the layer it copies (``norm_eval``, frozen layers)."""
        for module in self.copies:
            for layer, copied in zip(module.modules(), source.modules(), strict=True):
                if layer.training != copied.training:
                    layer.training = copied.training

    def _has_buffers_of(self, source: nn.Module) -> bool:
        """Whether the buffers of E and B that were not loaded equal those of ``source``."""
        own, theirs = self.state_dict(), source.state_dict()
        return all(torch.equal(own[name], theirs[name.partition('.')[2]]) for name in self._missing_buffers)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        own = self.state_dict(keep_vars=True)
        given = {name: state_dict.get(prefix + name) for name in own}
        missing = [name for name, value in given.items() if value is None or value.shape != own[name].shape]
        self.is_loaded = not any(isinstance(own[name], nn.Parameter) for name in missing)
        self._missing_buffers = missing
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_transfer_options(
    ema: bool = True, bias: str | bool = 'unit', scale: str | bool = True, source_unit: str | Sequence[str] = 'next'
) -> None:
    """Raise :class:`ConfigError` if the options of a :class:`MomentumTransfer` contradict each other."""
    if scale and not (ema and bias):
        raise ConfigError('transfer.scale weighs the momentum copy against the bias: set ema=True and a bias, or scale=False')
    if bias in ('channel', 'depthwise') and not ema:
        raise ConfigError(f"transfer.bias={bias!r} acts on the momentum copy's output: set ema=True")
    if source_unit != 'next' and not ema and bias != 'unit':
        raise ConfigError("transfer.source_unit names the unit that is copied: set ema=True or bias='unit'")


def _float_tensors(module: nn.Module) -> list[Tensor]:
    """The floating-point parameters and persistent buffers of a module, in an order that depends on its structure only."""
    kept = []
    for layer in module.modules():
        kept += layer._parameters.values()
        kept += (value for name, value in layer._buffers.items() if name not in layer._non_persistent_buffers_set)
    return [tensor for tensor in kept if tensor is not None and tensor.is_floating_point()]
