"""What to look at first when local training misbehaves: gradients, dead channels and momentum copies, by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.local.local_head import LocalHead


@torch.no_grad()
def copy_distance(head: LocalHead, backbone: nn.Module) -> float | None:
    """The relative distance ``|E - source| / |source|`` of a momentum copy from its source, over all parameters.

    Args:
        head: A local head of ``backbone``.
        backbone: The localised backbone.

    Returns:
        At least 0; 0 if the copy equals its source. None if the head has no momentum copy.
    """
    if head.transfer.momentum is None:
        return None
    ours, theirs = ([p.double() for p in module.parameters()] for module in (head.transfer.momentum, head.source.of(backbone)))
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(ours, theirs, strict=True)])
    return float(difference / torch.nn.utils.get_total_norm(theirs))


class StepMonitor:
    """Measures every block during training steps, while the context is open. The steps compute what they would without it.

    Args:
        backbone: The localised backbone.
        optimizer: The optimizer.
        blocks: For each of the K blocks, the parameters that its loss trains.
    """

    def __init__(self, backbone: nn.Module, optimizer: Optimizer, blocks: Sequence[Iterable[nn.Parameter]]) -> None:
        self._backbone = backbone
        self._optimizer = optimizer
        self._blocks = [[*block] for block in blocks]
        self._alive: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> StepMonitor:
        self._alive, self._norms = {}, {}
        self._handles = [self._optimizer.register_step_pre_hook(self._measure_gradients)]
        for j, block in enumerate(self._backbone.local.plan.blocks, start=1):
            module = self._backbone.get_submodule(block[-1].output)
            self._handles.append(module.register_forward_hook(self._measure_output(j)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def gradients(self) -> dict[int, float]:
        """L2 norm of the gradient that the optimizer stepped each block with, by block from 1.

        Reduction over processes, accumulation, unscaling and clipping come before. Blocks without a gradient are left out.
        """
        return {j: float(norm) for j, norm in sorted(self._norms.items())}

    @property
    def dead(self) -> dict[int, float]:
        """Share of the channels of each block's output that are zero in all images and places, 0 to 1, by block from 1."""
        return {j: 1 - float(alive.float().mean()) for j, alive in sorted(self._alive.items())}

    def _measure_gradients(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        scale = getattr(optimizer, 'grad_scale', None)  # set by a loss scaler if the optimizer itself unscales the gradients
        for j, block in enumerate(self._blocks, start=1):
            if gradients := [p.grad for p in block if p.grad is not None]:
                norm = torch.nn.utils.get_total_norm(gradients)
                self._norms[j] = norm if scale is None else norm / scale

    def _measure_output(self, block: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            dims = (0, 2, 3) if output.dim() == 4 else (0, 1)
            alive = output.detach().ne(0).amax(dims)
            self._alive[block] = self._alive[block] | alive if block in self._alive else alive

        return hook
