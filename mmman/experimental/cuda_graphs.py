"""A training step as CUDA graphs: recorded once for every shape of a batch, then started part by part.

A fast GPU waits for the CPU that starts its operators one by one, and a step that takes images a few at a time and computes
units again has many of them. A graph starts them at once. A part ends with the backward pass of a block, so that blocks step in
between as ever; and where a dense head asks for its targets, which depend on the data in another way than by value.
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

from mmman.errors import MisuseError
from mmman.memory.chunks import Losses, replaced, with_gradients
from mmman.memory.detection.anchor_targets import AnchorTargets, check_known
from mmman.memory.detection.focal_loss import fused_focal_loss

if TYPE_CHECKING:
    from mmman.local.blocks import LocalBlocks
    from mmman.local.session import Session


T = TypeVar('T')


class Recorder(Protocol):
    """Records what runs on the device between :meth:`begin` and :meth:`end`."""

    def begin(self) -> None: ...

    def end(self) -> Callable[[], None]:
        """What runs the recorded operators, on the memory they were recorded with."""

    def cancel(self) -> None:
        """End a recording that failed, if one is going on."""

    def place_of(self, tensor: Tensor) -> Tensor:
        """The memory of a tensor that a recording made, which isn't kept from being used again by a later part."""

    def start(self) -> None:
        """From now on what runs aside sees what was made before."""

    def aside(self, compute: Callable[[], T]) -> T:
        """Run ``compute``, which gives tensors, without waiting for the recordings that were started."""

    def nbytes(self) -> int:
        """Bytes that the recordings' memory takes of the device, in use or not."""


class CUDARecorder:
    """Records CUDA graphs that share their memory: what a part leaves free is the next part's, of every shape."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._stream, self._side = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        self._recording: torch.cuda.graph | None = None

    def begin(self) -> None:
        # other threads, which load data, may go on
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
    """Bytes on the device, as other libraries hand them over."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {'shape': (size,), 'typestr': '|u1', 'data': (pointer, False), 'version': 3}


class _Asked:
    """Stands for a dense head where that asks for anchors and targets in a recording.

    Args:
        head: An anchor-based dense head that :func:`check_known` accepts.
        size_range: The sizes of the objects it is shown; None: all.
        cut: Called when it asks for its targets. A new part begins then: nothing in it uses their memory before.
    """

    def __init__(self, head: nn.Module, size_range: tuple[float, float] | None, cut: Callable[[], None]) -> None:
        self.head, self.size_range, self._cut = head, size_range, cut
        self.made: tuple[Tensor, ...] = ()

    def anchors(self, sizes: list[tuple[int, int]], metas: list[dict], device: torch.device | str) -> tuple:
        """In the place of ``get_anchors``. Their values aren't read by the losses."""
        self.sizes, self.device, self.count = [(*size,) for size in sizes], device, len(metas)
        priors = self.head.prior_generator.num_base_priors
        self.levels = [height * width * per_place for (height, width), per_place in zip(sizes, priors, strict=True)]
        anchors = [torch.empty(1, 1, device=device).expand(level, 4) for level in self.levels]
        return [anchors] * self.count, [None] * self.count

    def targets(self, *_: object, **__: object) -> tuple:
        """In the place of ``get_targets``: memory to be filled before the part runs."""
        self._cut()
        shape = self.count, sum(self.levels)
        shapes = {'labels': shape, 'weights': shape, 'boxes': (*shape, 4), 'box weights': (*shape, 4), 'positive': ()}
        integers = {'labels', 'positive'}
        self.made = tuple(
            _unfilled(shape, torch.long if name in integers else torch.float, self.device) for name, shape in shapes.items()
        )
        *targets, factor = self.made
        return *([*target.split(self.levels, dim=1)] for target in targets), factor


@dataclass
class _Part:
    """What runs from one cut of a recording to the next.

    Attributes:
        replay: Runs it.
        targets: Of a dense head whose losses it computes.
        places: Where it reads these.
        gradients: The memory of the gradients that are there at its end, and weren't before.
        block: The block that they are of; None of the last one, and where there are none.
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
    """A recorded step: where its inputs go, its parts in order, and where its losses are found."""

    inputs: Tensor
    parts: list[_Part]
    log: Losses
    losses: Losses


class StepGraphs:
    """Runs the training steps of a single-stage detector, each shape of a batch from the second time on, as recorded graphs.

    The first step is an ordinary one. What is computed is what is computed without graphs, but for the rounding of the focal
    loss, which here isn't mmcv's operator, and of the division by the number of positive anchors.

    Args:
        model: The detector.
        loss: Computes its losses: its own ``loss``, or :meth:`DenseLoss.of_task`.
        local: Its local heads.
        backward: Back-propagates the local loss of a block.
        stepped: What follows a block's backward pass.
        recorder: What records.

    Raises:
        MisuseError: A dense head whose targets can't be computed in advance.
    """

    def __init__(
        self,
        model: BaseModel,
        loss: Callable[[Tensor, list], dict],
        local: LocalBlocks,
        backward: Callable[[Tensor, int], None],
        stepped: Callable[[int], None],
        recorder: Recorder,
    ) -> None:
        self.model, self.recorder, self._loss = model, recorder, loss
        self._backward, self._stepped = backward, stepped
        self._local = local.trained()
        self._steps: dict[tuple, _Step] = {}
        self._is_warm = False
        for head in (*(head.dense_head for head in self._local), getattr(model, 'bbox_head', None)):
            check_known(head, model)

    def of_task(self, session: Session, inputs: Tensor, data_samples: list) -> dict:
        """Stands for the model's ``loss`` in a session. Arguments and result as there."""
        if not self._is_warm:  # libraries set themselves up
            self._is_warm = True
            with fused_focal_loss(with_kernel=False):
                return self._loss(inputs, data_samples)
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
            session.passed()
        else:
            step = self._steps[key] = self._record(session, inputs, data_samples)
        session.log.update(step.log)
        gradients = step.parts[-1].gradients
        return with_gradients(step.losses, inputs.new_ones(()), [own.detach() for own in gradients.values()], [*gradients])

    def _key(self, inputs: Tensor) -> tuple:
        """What a recording holds for: the shape, which modules train, and the memory of the model, without gradients so far."""
        found: list[int] = []
        modules = [self.model]
        while modules:  # far faster than the iterators of nn.Module, for which the GPU would wait
            module = modules.pop()
            modules += filter(_is_there, module._modules.values())
            found.append(module.training)
            for parameter in filter(_is_there, module._parameters.values()):
                found += parameter.data_ptr(), parameter.requires_grad
                if parameter.grad is not None:
                    raise MisuseError(
                        'cuda_graphs: there are gradients before the step: call zero_grad(set_to_none=True) after each'
                    )
            found += (buffer.data_ptr() for buffer in filter(_is_there, module._buffers.values()))
        return inputs.shape, inputs.dtype, *found

    def _record(self, session: Session, inputs: Tensor, data_samples: list) -> _Step:
        """Record a step, and run each part of it as soon as it is there."""
        recorder, place_of = self.recorder, self.recorder.place_of
        parts: list[_Part] = []
        known: set[nn.Parameter] = set()

        def end(block: int | None = None) -> None:
            replay = recorder.end()
            targets, places = None, []
            for one in (one for one in asked if one.made):
                targets = AnchorTargets(one.head, one.sizes, one.size_range, one.device)
                places, one.made = [place_of(tensor) for tensor in one.made], ()
            new = (p for p in self.model.parameters() if p.grad is not None and p not in known)
            gradients = {p: place_of(p.grad) for p in new}
            known.update(gradients)
            if not parts:
                place.copy_(inputs)
                only_shape = inputs.new_empty(()).expand(inputs.shape)  # nothing reads more of them from here on
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

        asked = [_Asked(head.dense_head, head.size_range, cut) for head in self._local]
        asked.append(_Asked(self.model.bbox_head, None, cut))
        recorder.begin()
        with self._failing(), fused_focal_loss(with_kernel=False), ExitStack() as stack:
            for one in asked:
                stack.enter_context(_answered(one))
            for head in self._local:
                stack.enter_context(replaced(head, 'shown', lambda samples: samples))
            made = [_unfilled(inputs.shape, inputs.dtype, inputs.device)]
            session.batch, place = (made[0], data_samples), place_of(made[0])
            stack.enter_context(replaced(session, 'backward', end_block))
            loss, log = self.model.parse_losses(self._loss(made.pop(), data_samples))
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
            if isinstance(error, RuntimeError) and not isinstance(error, (MisuseError, torch.OutOfMemoryError)):
                raise MisuseError(
                    f'{type(self.model).__name__} has an operator that no CUDA graph can hold, such as one that waits for the '
                    f'device ({error}): set optim_wrapper.cuda_graphs=False'
                ) from error
            raise


@contextmanager
def _answered(asked: _Asked) -> Iterator[None]:
    """The head asks there for its targets, and doesn't look at values to compute its losses."""
    from mmdet.models.losses import L1Loss

    head = asked.head
    with ExitStack() as stack:
        stack.enter_context(replaced(head, 'get_anchors', asked.anchors))
        stack.enter_context(replaced(head, 'get_targets', asked.targets))
        if type(head.loss_bbox) is L1Loss:
            stack.enter_context(replaced(head.loss_bbox, 'forward', partial(_l1, head.loss_bbox)))
        yield


def _is_there(value: object) -> bool:
    return value is not None


def _unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory, into which a recording doesn't write by itself: ``torch.empty`` does where algorithms are to be deterministic."""
    options, before = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    options.fill_uninitialized_memory = False
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    finally:
        options.fill_uninitialized_memory = before


def _l1(loss: nn.Module, pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor) -> Tensor:
    """mmdet's ``L1Loss``, without the look whether any weight is positive: if none is, this is zero as well."""
    from mmdet.models.losses import l1_loss

    return loss.loss_weight * l1_loss(pred, target, weight, reduction=loss.reduction, avg_factor=avg_factor)
