"""Run a training step as CUDA graphs: captured once for each batch shape, then launched segment by segment.

A fast GPU waits for the CPU to launch its kernels one by one, and a step that runs in chunks of images and recomputes units has
many kernel launches. A graph launches them in one call. A segment ends after the backward pass of a block, so that blocks step
in between as usual. A segment also ends where a dense head needs its targets, which have data-dependent shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmman.errors import ConfigError
from mmman.memory.chunks import Losses, attach_grads
from mmman.memory.detection.anchor_targets import AnchorTargets, check_stock_targets
from mmman.memory.detection.dense_loss import DenseLocalHead, DenseLoss
from mmman.memory.detection.focal_loss import focal_loss_without_kernel, summed_focal_loss
from mmman.memory.detection.losses import BatchLoss, Sizes, SummedAnchorLoss
from mmman.memory.recompute import Recomputed

if TYPE_CHECKING:
    from mmman.local.blocks import LocalBlocks
    from mmman.local.local_head import LocalHead
    from mmman.local.session import Session


T = TypeVar('T')


class GraphCapturer(Protocol):
    """Captures the device operations between :meth:`begin` and :meth:`end`."""

    def begin(self) -> None: ...

    def end(self) -> Callable[[], None]:
        """End the capture. Returns a function that launches the captured operations on the memory used in the capture."""

    def cancel(self) -> None:
        """End a capture that failed, if one is in progress."""

    def static_view(self, tensor: Tensor) -> Tensor:
        """A view of the memory of a tensor from a capture. It doesn't keep later segments from reusing the memory."""

    def sync_side_stream(self) -> None:
        """Make the current stream's work so far visible to later calls of :meth:`on_side_stream`."""

    def on_side_stream(self, compute: Callable[[], T]) -> T:
        """Run ``compute``, which returns tensors, without waiting for segments launched since :meth:`sync_side_stream`."""

    def nbytes(self) -> int:
        """Bytes of device memory that the captures reserve, in use or not."""


class CUDAGraphCapturer:
    """Captures CUDA graphs that share a memory pool: memory freed by one segment is reused by the next, for any batch shape."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._stream, self._side = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        self._capture: torch.cuda.graph | None = None

    def begin(self) -> None:
        # thread_local: other threads, which load data, continue
        capture = torch.cuda.graph(torch.cuda.CUDAGraph(), self.pool, self._stream, capture_error_mode='thread_local')
        capture.__enter__()
        self._capture = capture

    def end(self) -> Callable[[], None]:
        capture, self._capture = self._capture, None
        capture.__exit__(None, None, None)
        return capture.cuda_graph.replay

    def cancel(self) -> None:
        if self._capture is not None:
            with suppress(RuntimeError):
                self._capture.cuda_graph.capture_end()
            self._capture.stream_ctx.__exit__(None, None, None)
            self._capture = None

    def static_view(self, tensor: Tensor) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        memory = _RawMemory(tensor.data_ptr(), extent * tensor.element_size())
        return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def sync_side_stream(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream())

    def on_side_stream(self, compute: Callable[[], T]) -> T:
        with torch.cuda.stream(self._side):
            result = compute()
        current = torch.cuda.current_stream()
        current.wait_stream(self._side)
        for tensor in tree_leaves(result):
            tensor.record_stream(current)
        return result

    def nbytes(self) -> int:
        segments = (one for one in torch.cuda.memory_snapshot() if (*one['segment_pool_id'],) == (*self.pool,))
        return sum(segment['total_size'] for segment in segments)


class _RawMemory:
    """Bytes on the device, exposed through the CUDA array interface."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {'shape': (nbytes,), 'typestr': '|u1', 'data': (pointer, False), 'version': 3}


class _LossWithoutKernel(SummedAnchorLoss):
    """Losses with a focal loss that doesn't force a device-to-host sync."""

    def class_loss(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return focal_loss_without_kernel(self.head.loss_cls, scores, labels, weights, avg_factor=self.avg_factor)


class _CapturedLoss(SummedAnchorLoss):
    """Losses of a dense head in a capture. Their targets are read from memory that is filled before the segment runs.

    Args:
        head: An anchor-based dense head that :func:`check_stock_targets` accepts.
        sizes: Height and width of its feature maps, by level.
        count: Number of images.
        device: Device of the targets.
        is_summed: Whether the focal loss is summed as it is computed; otherwise a map of losses is kept.
    """

    def __init__(self, head: nn.Module, sizes: Sizes, count: int, device: torch.device, is_summed: bool) -> None:
        self.head, self.is_summed = head, is_summed
        priors = head.prior_generator.num_base_priors
        levels = [height * width * per_place for (height, width), per_place in zip(sizes, priors, strict=True)]
        shape = count, sum(levels)
        shapes = {'labels': shape, 'weights': shape, 'boxes': (*shape, 4), 'box weights': (*shape, 4), 'positive': ()}
        integers = {'labels', 'positive'}
        self.memory = tuple(
            _empty(shape, torch.long if name in integers else torch.float, device) for name, shape in shapes.items()
        )
        *targets, self.avg_factor = self.memory
        self.targets = [[*target.split(levels, dim=1)] for target in targets]

    def class_loss(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        loss = summed_focal_loss if self.is_summed else focal_loss_without_kernel
        return loss(self.head.loss_cls, scores, labels, weights, avg_factor=self.avg_factor)

    def box_loss(self, boxes: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """mmdet's box loss. Omits ``L1Loss``'s check for a positive weight: without one, the result is zero as well."""
        from mmdet.models.losses import L1Loss, l1_loss

        loss = self.head.loss_bbox
        if type(loss) is not L1Loss:
            return loss(boxes, targets, weights, avg_factor=self.avg_factor)
        value = l1_loss(boxes, targets, weights, reduction=loss.reduction, avg_factor=self.avg_factor)
        return loss.loss_weight * value


@dataclass
class _Segment:
    """A segment: the operations from one cut of a capture to the next.

    Attributes:
        replay: Launches the segment.
        targets: Targets of the dense head whose losses the segment computes; None if it computes none.
        target_buffers: The memory that the segment reads these targets from.
        gradients: The memory of the gradients that exist at the segment's end, but not before it.
        block: The block that these gradients belong to; None for the last block, and if there are no gradients.
    """

    replay: Callable[[], None]
    targets: AnchorTargets | None
    target_buffers: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]
    block: int | None

    def launch(self, capturer: GraphCapturer, data_samples: list) -> None:
        if self.targets is not None:
            self.targets.write(capturer.on_side_stream(partial(self.targets.match, data_samples)), self.target_buffers)
        self.replay()


@dataclass
class _CapturedStep:
    """A captured step: the memory of its inputs, its segments in order, and the memory of its losses."""

    inputs: Tensor
    segments: list[_Segment]
    log: Losses
    losses: Losses


class StepGraphs:
    """Runs training steps of a single-stage detector as CUDA graphs, captured the first time that a batch shape occurs.

    The very first step runs without graphs. Results equal those without graphs, up to the rounding of the focal loss, which
    doesn't use mmcv's operator here, and of the division by the number of positive anchors.

    Args:
        model: The detector.
        chunk_size: Images per chunk, as in :class:`DenseLoss`.
        local: The model's local heads.
        backward: Back-propagates the local loss of a block.
        after_backward: Called after a block's backward pass.
        capturer: Captures the graphs.

    Raises:
        ConfigError: The targets of a dense head can't be computed in advance; in the first step, if it draws random numbers and
            units are recomputed.
    """

    def __init__(
        self,
        model: BaseModel,
        chunk_size: int | None,
        local: LocalBlocks,
        backward: Callable[[Tensor, int], None],
        after_backward: Callable[[int], None],
        capturer: GraphCapturer,
    ) -> None:
        self.model, self.capturer = model, capturer
        self._backward, self._after_backward = backward, after_backward
        self._local = local.trained_heads()
        self._dense = DenseLoss(model, chunk_size, lambda loss: loss, self._make_loss)
        self._end_segment: Callable[[], None] | None = None  # set during a capture
        self._pending_targets: tuple[_CapturedLoss, AnchorTargets] | None = None
        self._steps: dict[tuple, _CapturedStep] = {}
        self._is_warm = False
        for head in (*(getattr(head, 'dense_head', None) for head in self._local), getattr(model, 'bbox_head', None)):
            check_stock_targets(head, model)

    def strategy_for(self, session: Session) -> _GraphStrategy:
        """Return the strategy that computes the losses of a step in a session."""
        return _GraphStrategy(self, session)

    def local_losses(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list) -> Losses:
        return self._dense.local_losses(head, y, inputs, data_samples)

    def _make_loss(
        self, owner: DenseLocalHead | None, head: nn.Module, data_samples: list, sizes: Sizes, like: Tensor
    ) -> BatchLoss:
        is_summed = self._dense.chunk_size is not None
        if self._end_segment is None:  # a step without graphs
            samples = data_samples if owner is None else owner.filter_gt(data_samples)
            return (SummedAnchorLoss if is_summed else _LossWithoutKernel)(head, sizes, samples, like)
        self._end_segment()  # nothing in the segment that begins here uses the memory of the previous targets
        loss = _CapturedLoss(head, sizes, len(data_samples), like.device, is_summed)
        gt_size_range = None if owner is None else owner.gt_size_range
        self._pending_targets = loss, AnchorTargets(head, sizes, gt_size_range, like.device)
        return loss

    def task_losses(self, session: Session, inputs: Tensor, data_samples: list) -> Losses:
        """Replaces the model's ``loss`` in a session. Takes the same arguments and returns the same result."""
        if not self._is_warm:  # libraries initialise in the first step
            before = _random_states(inputs.device)
            losses = self._dense.task_losses(inputs, data_samples)
            self._check_recompute(all(map(torch.equal, before, _random_states(inputs.device))))
            self._is_warm = True
            return losses
        self.capturer.sync_side_stream()
        key = self._capture_key(inputs)
        if key in self._steps:
            step = self._steps[key]
            step.inputs.copy_(inputs)
            for segment in step.segments:
                segment.launch(self.capturer, data_samples)
                if segment.block is not None:
                    for parameter, gradient in segment.gradients.items():
                        parameter.grad = gradient.detach()
                    self._after_backward(segment.block)
            session.mark_all_passed()
        else:
            step = self._steps[key] = self._capture_step(session, inputs, data_samples)
        session.log.update(step.log)
        gradients = step.segments[-1].gradients
        return attach_grads(step.losses, inputs.new_ones(()), [own.detach() for own in gradients.values()], [*gradients])

    def _check_recompute(self, is_deterministic: bool) -> None:
        recomputed = (name for name, own in self.model.named_modules() if isinstance(vars(own).get('forward'), Recomputed))
        if not is_deterministic and (name := next(recomputed, None)):
            raise ConfigError(
                f'cuda_graphs: the step draws random numbers (dropout, drop path), which a CUDA graph cannot draw again '
                f'for the units that it recomputes ({name}, ...): set recompute=False, or optim_wrapper.cuda_graphs=False'
            )

    def _capture_key(self, inputs: Tensor) -> tuple:
        """What a capture is valid for: shape, dtype, training modes and the model's memory. Gradients must not exist yet."""
        found: list[int] = []
        modules = [self.model]
        while modules:  # far faster than nn.Module's iterators, which would leave the GPU idle
            module = modules.pop()
            modules += filter(_is_not_none, module._modules.values())
            found.append(module.training)
            for parameter in filter(_is_not_none, module._parameters.values()):
                found += parameter.data_ptr(), parameter.requires_grad
                if parameter.grad is not None:
                    raise ConfigError(
                        'cuda_graphs: gradients exist before the step: call zero_grad(set_to_none=True) after each step'
                    )
            found += (buffer.data_ptr() for buffer in filter(_is_not_none, module._buffers.values()))
        return inputs.shape, inputs.dtype, *found

    def _capture_step(self, session: Session, inputs: Tensor, data_samples: list) -> _CapturedStep:
        """Capture a step, and launch each segment as soon as it is captured."""
        capturer, static_view = self.capturer, self.capturer.static_view
        segments: list[_Segment] = []
        seen: set[nn.Parameter] = set()

        def end(block: int | None = None) -> None:
            replay = capturer.end()
            targets, target_buffers = None, []
            if self._pending_targets is not None:
                (loss, targets), self._pending_targets = self._pending_targets, None
                target_buffers = [static_view(tensor) for tensor in loss.memory]
                del loss.memory
            new = (p for p in self.model.parameters() if p.grad is not None and p not in seen)
            gradients = {p: static_view(p.grad) for p in new}
            seen.update(gradients)
            if not segments:
                static_inputs.copy_(inputs)
                shape_only = inputs.new_empty(()).expand(inputs.shape)  # from here on only the shape is read
                session.batch = shape_only, data_samples
            segments.append(_Segment(replay, targets, target_buffers, gradients, block))
            segments[-1].launch(capturer, data_samples)

        def end_segment() -> None:
            end()
            capturer.begin()

        def end_block(loss: Tensor, block: int) -> None:
            self._backward(loss, block)
            end(block)
            self._after_backward(block)
            capturer.begin()

        capturer.begin()
        with self._cancel_on_error(), ExitStack() as stack:
            stack.callback(setattr, session, 'backward', session.backward)
            stack.callback(setattr, self, '_end_segment', None)
            session.backward, self._end_segment = end_block, end_segment
            captured = [_empty(inputs.shape, inputs.dtype, inputs.device)]  # a list, so that the last reference can be popped
            session.batch, static_inputs = (captured[0], data_samples), static_view(captured[0])
            loss, log = self.model.parse_losses(self._dense.task_losses(captured.pop(), data_samples))
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            losses = {name: value.detach() for name, value in log.items() if name != 'loss'}
            del loss, log
            end()
        for parameter in segments[-1].gradients:
            parameter.grad = None
        logs = ({name: static_view(value) for name, value in some.items()} for some in (session.log, losses))
        return _CapturedStep(static_inputs, segments, *logs)

    @contextmanager
    def _cancel_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.capturer.cancel()
            if isinstance(error, RuntimeError) and not isinstance(error, (ConfigError, torch.OutOfMemoryError)):
                raise ConfigError(
                    f'{type(self.model).__name__} has an operator that a CUDA graph cannot capture, such as one that forces a '
                    f'device-to-host sync ({error}): set optim_wrapper.cuda_graphs=False'
                ) from error
            raise


@dataclass
class _GraphStrategy:
    """A :class:`mmman.local.session.StepStrategy` for one session."""

    graphs: StepGraphs
    session: Session

    def task_losses(self, inputs: Tensor, data_samples: list) -> Losses:
        return self.graphs.task_losses(self.session, inputs, data_samples)

    def local_losses(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list) -> Losses:
        return self.graphs.local_losses(head, y, inputs, data_samples)


def _random_states(device: torch.device) -> list[Tensor]:
    """States of the generators of the CPU and of ``device``."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == 'cuda' else [])]


def _is_not_none(value: object) -> bool:
    return value is not None


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised memory, without the fill that ``torch.empty`` adds (and a capture includes) in deterministic mode."""
    options, before = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    options.fill_uninitialized_memory = False
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    finally:
        options.fill_uninitialized_memory = before
