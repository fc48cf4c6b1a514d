"""Attribute live memory to parts of a training step, by hooks at the boundaries of blocks. The step computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmman.analysis.memory import LiveParts
from mmman.local.blocks import LocalBlocks

TASK = 'neck, head, loss'


def block_outputs(model: BaseModel) -> list[str]:
    """Paths, relative to the backbone, of the modules that end the blocks with a local head. Empty for an end-to-end model."""
    local = getattr(model.backbone, 'local', None)
    return [block[-1].output for block in local.plan.blocks[:-1]] if isinstance(local, LocalBlocks) else []


@contextmanager
def attribute_memory(live: LiveParts, model: BaseModel, optim_wrapper: OptimWrapper, outputs: Sequence[str]) -> Iterator[None]:
    """Set ``live.part`` to the running part of every training step inside this context.

    The parts are ``input`` until the backbone starts, ``block 1`` to ``block K``, ``local head 1`` to ``K-1``,
    ``neck, head, loss``, ``optimizer step`` and ``rest``. The backward pass of a block starts when the gradient of its output
    is available. A parameter's gradient belongs to ``gradients`` as soon as it is accumulated.

    Args:
        live: The counter whose parts are set.
        model: The model to hook.
        optim_wrapper: Its optim wrapper.
        outputs: Paths, relative to the backbone, of the modules that end the first K-1 blocks.
    """
    marks = _Marks(live, last=len(outputs) + 1, has_heads=bool(block_outputs(model)))
    with ExitStack() as stack:

        def attach(handle: Any) -> None:
            stack.callback(handle.remove)

        for block, path in enumerate(outputs, start=1):
            marks.attach_boundary(model.backbone.get_submodule(path), block, attach)
        attach(model.backbone.register_forward_pre_hook(marks.into_backbone))
        attach(model.backbone.register_forward_hook(marks.out_of_backbone))
        attach(optim_wrapper.optimizer.register_step_pre_hook(marks.into_optimizer))
        attach(optim_wrapper.optimizer.register_step_post_hook(marks.out_of_optimizer))
        for parameter in model.parameters():
            if parameter.requires_grad:
                attach(parameter.register_post_accumulate_grad_hook(marks.gradient))
        backward = optim_wrapper.backward

        def marked(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            live.part = 'rest'

        optim_wrapper.backward = marked
        stack.callback(delattr, optim_wrapper, 'backward')
        yield


class _Marks:
    """The hooks, which set ``live.part``."""

    def __init__(self, live: LiveParts, last: int, has_heads: bool) -> None:
        self.live, self.last, self.has_heads = live, last, has_heads
        self.suspended = live.part

    def attach_boundary(self, module: nn.Module, block: int, attach: Callable[[Any], None]) -> None:
        """Hook the end of a block, once before and once after its local head."""

        def before(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.enter_backward_of(block, output)
            self.live.part = f'local head {block}' if self.has_heads else f'block {block + 1}'

        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.live.part = f'block {block + 1}'

        attach(module.register_forward_hook(before, prepend=True))
        attach(module.register_forward_hook(after))

    def enter_backward_of(self, block: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(self.live, 'part', f'block {block}'))

    def into_backbone(self, *_: Any) -> None:
        self.live.part = 'block 1'

    def out_of_backbone(self, module: nn.Module, args: tuple, outputs: object) -> None:
        *_, deepest = (leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor))
        self.enter_backward_of(self.last, deepest)
        self.live.part = TASK

    def into_optimizer(self, *_: Any) -> None:
        self.suspended, self.live.part = self.live.part, 'optimizer step'

    def out_of_optimizer(self, *_: Any) -> None:
        self.live.part = self.suspended

    def gradient(self, parameter: nn.Parameter) -> None:
        self.live.claim(parameter.grad, 'gradients')
