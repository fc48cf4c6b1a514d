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
from mmman.memory.chunks import Losses, with_gradients
from mmman.memory.detection.anchor_targets import AnchorTargets, check_known
from mmman.memory.detection.dense_loss import DenseLocalHead, DenseLoss
from mmman.memory.detection.focal_loss import focal_loss_without_kernel, summed_focal_loss
from mmman.memory.detection.losses import BatchLoss, Sizes, SummedAnchorLoss

if TYPE_CHECKING:
    from mmman.local.blocks import LocalBlocks
    from mmman.local.local_head import LocalHead
    from mmman.local.session import Session


T = TypeVar('T')


class Recorder(Protocol):
    """Captures the device operations between :meth:`begin` and :meth:`end`."""

    def begin(self) -> None: ...

    def end(self) -> Callable[[], None]:
        """End the capture. Returns a function that launches the captured operations on the memory used in the capture."""

    def cancel(self) -> None:
        """End a capture that failed, if one is in progress."""

    def place_of(self, tensor: Tensor) -> Tensor:
        """A view of the memory of a tensor from a capture. It doesn't keep later segments from reusing the memory."""

    def start(self) -> None:
        """Make the current stream's work so far visible to later calls of :meth:`aside`."""

    def aside(self, compute: Callable[[], T]) -> T:
        """Run ``compute``, which returns tensors, without waiting for segments launched since :meth:`start`."""

    def nbytes(self) -> int:
        """Bytes of device memory that the captures reserve, in use or not."""


class CUDARecorder:
    """Captures CUDA graphs that share a memory pool: memory freed by one segment is reused by the next, for any batch shape."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._stream, self._side = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        self._recording: torch.cuda.graph | None = None

    def begin(self) -> None:
        # thread_local: other threads, which load data, continue
        recording = torch.cuda.graph(torch.cuda.CUDAGraph(), self.pool, self._stream, capture_error_mode='thread_local')
        recording.__enter__()
        self._recording = recording

    def end(self) -> Callable[[], None]:
        recording, self._recording = self._recording, None
        recording.__exit__(None, None, None)
        return recording.cuda_graph.replay

    def cancel(self) -> None:
        if self._recording is not None:
            with suppress(RuntimeError):
                self._recording.cuda_graph.capture_end()
            self._recording.stream_ctx.__exit__(None, None, None)
            self._recording = None

    def place_of(self, tensor: Tensor) -> Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        raw = _Raw(tensor.data_ptr(), size * tensor.element_size())
        return torch.as_tensor(raw, device=tensor.device).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def start(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream())

    def aside(self, compute: Callable[[], T]) -> T:
        with torch.cuda.stream(self._side):
            made = compute()
        here = torch.cuda.current_stream()
        here.wait_stream(self._side)
        for tensor in tree_leaves(made):
            tensor.record_stream(here)
        return made

    def nbytes(self) -> int:
        segments = (one for one in torch.cuda.memory_snapshot() if (*one['segment_pool_id'],) == (*self.pool,))
        return sum(segment['total_size'] for segment in segments)


class _Raw:
    """Bytes on the device, exposed through the CUDA array interface."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {'shape': (size,), 'typestr': '|u1', 'data': (pointer, False), 'version': 3}


class _LossWithoutKernel(SummedAnchorLoss):
    """Losses with a focal loss that doesn't force a device-to-host sync."""

    def class_loss(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return focal_loss_without_kernel(self.head.loss_cls, scores, labels, weights, avg_factor=self.avg_factor)


class _RecordedLoss(SummedAnchorLoss):
    """Losses of a dense head in a capture. Their targets are read from memory that is filled before the segment runs.

    Args:
        head: An anchor-based dense head that :func:`check_known` accepts.
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
            _unfilled(shape, torch.long if name in integers else torch.float, device) for name, shape in shapes.items()
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
class _Part:
    """A segment: the operations from one cut of a capture to the next.

    Attributes:
        replay: Launches the segment.
        targets: Targets of the dense head whose losses the segment computes; None if it computes none.
        places: The memory that the segment reads these targets from.
        gradients: The memory of the gradients that exist at the segment's end, but not before it.
        block: The block that these gradients belong to; None for the last block, and if there are no gradients.
    """

    replay: Callable[[], None]
    targets: AnchorTargets | None
    places: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]
    block: int | None

    def run(self, recorder: Recorder, data_samples: list) -> None:
        if self.targets is not None:
            self.targets.write(recorder.aside(partial(self.targets.find, data_samples)), self.places)
        self.replay()


@dataclass
class _Step:
    """A captured step: the memory of its inputs, its segments in order, and the memory of its losses."""

    inputs: Tensor
    parts: list[_Part]
    log: Losses
    losses: Losses


class StepGraphs:
    """Runs training steps of a single-stage detector as CUDA graphs, captured the first time that a batch shape occurs.

    The very first step runs without graphs. Results equal those without graphs, up to the rounding of the focal loss, which
    doesn't use mmcv's operator here, and of the division by the number of positive anchors.

    Args:
        model: The detector.
        size: Images per chunk, as in :class:`DenseLoss`.
        local: The model's local heads.
        backward: Back-propagates the local loss of a block.
        stepped: Called after a block's backward pass.
        recorder: Captures the graphs.

    Raises:
        ConfigError: The targets of a dense head can't be computed in advance.
    """

    def __init__(
        self,
        model: BaseModel,
        size: int | None,
        local: LocalBlocks,
        backward: Callable[[Tensor, int], None],
        stepped: Callable[[int], None],
        recorder: Recorder,
    ) -> None:
        self.model, self.recorder = model, recorder
        self._backward, self._stepped = backward, stepped
        self._local = local.trained_heads()
        self._dense = DenseLoss(model, size, lambda loss: loss, self._make_loss)
        self._cut: Callable[[], None] | None = None  # set during a capture
        self._asked: tuple[_RecordedLoss, AnchorTargets] | None = None
        self._steps: dict[tuple, _Step] = {}
        self._is_warm = False
        for head in (*(getattr(head, 'dense_head', None) for head in self._local), getattr(model, 'bbox_head', None)):
            check_known(head, model)

    def in_session(self, session: Session) -> _GraphStrategy:
        """Return the strategy that computes the losses of a step in a session."""
        return _GraphStrategy(self, session)

    def local_losses(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list) -> Losses:
        return self._dense.local_losses(head, y, inputs, data_samples)

    def _make_loss(
        self, owner: DenseLocalHead | None, head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor
    ) -> BatchLoss:
        is_summed = self._dense.size is not None
        if self._cut is None:  # a step without graphs
            samples = data_samples if owner is None else owner.filter_gt(data_samples)
            return (SummedAnchorLoss if is_summed else _LossWithoutKernel)(head, sizes, samples, like)
        self._cut()  # nothing in the segment that begins here uses the memory of the previous targets
        loss = _RecordedLoss(head, sizes, len(data_samples), like.device, is_summed)
        size_range = None if owner is None else owner.gt_size_range
        self._asked = loss, AnchorTargets(head, sizes, size_range, like.device)
        return loss

    def task_losses(self, session: Session, inputs: Tensor, data_samples: list) -> Losses:
        """Replaces the model's ``loss`` in a session. Takes the same arguments and returns the same result."""
        if not self._is_warm:  # libraries initialise in the first step
            self._is_warm = True
            return self._dense.task_losses(inputs, data_samples)
        self.recorder.start()
        key = self._key(inputs)
        if key in self._steps:
            step = self._steps[key]
            step.inputs.copy_(inputs)
            for part in step.parts:
                part.run(self.recorder, data_samples)
                if part.block is not None:
                    for parameter, gradient in part.gradients.items():
                        parameter.grad = gradient.detach()
                    self._stepped(part.block)
            session.mark_all_passed()
        else:
            step = self._steps[key] = self._record(session, inputs, data_samples)
        session.log.update(step.log)
        gradients = step.parts[-1].gradients
        return with_gradients(step.losses, inputs.new_ones(()), [own.detach() for own in gradients.values()], [*gradients])

    def _key(self, inputs: Tensor) -> tuple:
        """What a capture is valid for: shape, dtype, training modes and the model's memory. Gradients must not exist yet."""
        found: list[int] = []
        modules = [self.model]
        while modules:  # far faster than nn.Module's iterators, which would leave the GPU idle
            module = modules.pop()
            modules += filter(_is_there, module._modules.values())
            found.append(module.training)
            for parameter in filter(_is_there, module._parameters.values()):
                found += parameter.data_ptr(), parameter.requires_grad
                if parameter.grad is not None:
                    raise ConfigError(
                        'cuda_graphs: there are gradients before the step: call zero_grad(set_to_none=True) after each'
                    )
            found += (buffer.data_ptr() for buffer in filter(_is_there, module._buffers.values()))
        return inputs.shape, inputs.dtype, *found

    def _record(self, session: Session, inputs: Tensor, data_samples: list) -> _Step:
        """Capture a step, and launch each segment as soon as it is captured."""
        recorder, place_of = self.recorder, self.recorder.place_of
        parts: list[_Part] = []
        known: set[nn.Parameter] = set()

        def end(block: int | None = None) -> None:
            replay = recorder.end()
            targets, places = None, []
            if self._asked is not None:
                (loss, targets), self._asked = self._asked, None
                places = [place_of(tensor) for tensor in loss.memory]
                del loss.memory
            new = (p for p in self.model.parameters() if p.grad is not None and p not in known)
            gradients = {p: place_of(p.grad) for p in new}
            known.update(gradients)
            if not parts:
                place.copy_(inputs)
                only_shape = inputs.new_empty(()).expand(inputs.shape)  # from here on only the shape is read
                session.batch = only_shape, data_samples
            parts.append(_Part(replay, targets, places, gradients, block))
            parts[-1].run(recorder, data_samples)

        def cut() -> None:
            end()
            recorder.begin()

        def end_block(loss: Tensor, block: int) -> None:
            self._backward(loss, block)
            end(block)
            self._stepped(block)
            recorder.begin()

        recorder.begin()
        with self._failing(), ExitStack() as stack:
            stack.callback(setattr, session, 'backward', session.backward)
            stack.callback(setattr, self, '_cut', None)
            session.backward, self._cut = end_block, cut
            made = [_unfilled(inputs.shape, inputs.dtype, inputs.device)]
            session.batch, place = (made[0], data_samples), place_of(made[0])
            loss, log = self.model.parse_losses(self._dense.task_losses(made.pop(), data_samples))
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            losses = {name: value.detach() for name, value in log.items() if name != 'loss'}
            del loss, log
            end()
        for parameter in parts[-1].gradients:
            parameter.grad = None
        logs = ({name: place_of(value) for name, value in some.items()} for some in (session.log, losses))
        return _Step(place, parts, *logs)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.recorder.cancel()
            if isinstance(error, RuntimeError) and not isinstance(error, (ConfigError, torch.OutOfMemoryError)):
                raise ConfigError(
                    f'{type(self.model).__name__} has an operator that no CUDA graph can hold, such as one that waits for the '
                    f'device ({error}): set optim_wrapper.cuda_graphs=False'
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


def _is_there(value: object) -> bool:
    return value is not None


def _unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised memory, without the fill that ``torch.empty`` adds (and a capture includes) in deterministic mode."""
    options, before = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    options.fill_uninitialized_memory = False
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    finally:
        options.fill_uninitialized_memory = before
