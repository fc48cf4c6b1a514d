"""Dense heads, the model's own and those of local heads, run on a few images at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmman.errors import MisuseError
from mmman.memory.chunks import Losses, replaced, run_in_chunks
from mmman.memory.detection.focal_loss import summed_focal_loss
from mmman.memory.detection.normalisers import Sizes, batch_normalisers, check_chunks

if TYPE_CHECKING:
    from mmman.local.local_head import LocalHead


class _Read(TorchDispatchMode):
    """Which tensors, or views of them, were read by operators while this mode was active."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            given = (leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor))
            self._storages.update(tensor.untyped_storage()._cdata for tensor in given)
        return func(*args, **(kwargs or {}))


class DenseLoss:
    """Computes the losses of single-stage detectors in chunks of a batch; gradients and values are those of the whole batch.

    Args:
        model: The detector.
        size: Images a chunk of the model's own neck and head.
        scaled: Multiplies a loss as the loss scaler does.

    Raises:
        MisuseError: The model is no single-stage detector.
    """

    def __init__(self, model: BaseModel, size: int, scaled: Callable[[Tensor], Tensor]) -> None:
        owner = next((cls.__name__ for cls in type(model).__mro__ if 'loss' in vars(cls)), None)
        if owner != 'SingleStageDetector':
            raise MisuseError(
                f'images_per_chunk is for models that compute their loss as SingleStageDetector does, not for '
                f'{type(model).__name__}: set optim_wrapper.images_per_chunk=None'
            )
        self.model, self.size, self._scaled = model, size, scaled
        self._loss = model.loss
        self._seen: dict[tuple, tuple[Sizes, list[bool]]] = {}

    def of_task(self, inputs: Tensor, data_samples: list, only_look: bool = False) -> Losses:
        """Stands for the model's ``loss``: the backbone at once, neck and head in chunks. Arguments and result as there.

        With ``only_look`` nothing comes of it but what is found out once for features of these shapes.
        """
        model = self.model
        features = [*model.backbone(inputs)]
        inputs = inputs.new_empty(()).expand(inputs.shape)  # whose pixels nothing reads any more
        modules = [part for name, part in model.named_children() if name not in ('backbone', 'data_preprocessor')]

        def losses(leaves: list[Tensor], span: slice) -> dict:
            with replaced(model.backbone, 'forward', lambda _: tuple(leaves)):
                return self._loss(inputs[span], data_samples[span])

        return self._run(losses, features, modules, model.bbox_head, data_samples, self.size, only_look)

    def of_local(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list, only_look: bool = False) -> Losses:
        """Stands for ``head.loss``: all of it in chunks, each with as many positions as one of the model's own head.

        Arguments and result as there; ``only_look`` as for :meth:`of_task`.
        """
        check_chunks(self.model.bbox_head, [])
        check_chunks(head.dense_head, [])
        size = max(1, int(self.size * _positions(self.model.bbox_head) / _positions(head.dense_head)))
        if size >= len(data_samples):
            with summed_focal_loss(head.dense_head):
                return {} if only_look else head.loss(y, inputs, data_samples)
        modules = [part for part in head.children() if part is not head.transfer]

        def losses(leaves: list[Tensor], span: slice) -> dict:
            return head.loss(leaves[0], inputs[span], data_samples[span])

        return self._run(losses, [y], modules, head.dense_head, head.shown(data_samples), size, only_look)

    def _run(
        self,
        losses: Callable[[list[Tensor], slice], dict],
        features: list[Tensor],
        modules: list[nn.Module],
        head: nn.Module,
        data_samples: list,
        size: int,
        only_look: bool,
    ) -> Losses:
        check_chunks(head, modules)
        sizes, is_read = self._look(losses, features, head)
        if only_look:
            return {}
        # nothing else holds what neck and head don't read
        features[:] = [
            feature if read else feature.new_zeros(()).expand(feature.shape)
            for feature, read in zip(features, is_read, strict=True)
        ]

        def compute(leaves: list[Tensor], span: slice) -> tuple[Tensor, Losses]:
            show(span)
            loss, log = self.model.parse_losses(losses(leaves, span))
            share = len(leaves[0]) / len(data_samples)
            return loss, {n: v if 'loss' in n else v * share for n, v in log.items() if n != 'loss'}

        with summed_focal_loss(head), batch_normalisers(head, sizes, data_samples, features[-1]) as show:
            return run_in_chunks(compute, features, modules, size, self._scaled(features[-1].new_ones(())))

    def _look(
        self, losses: Callable[[list[Tensor], slice], dict], features: list[Tensor], head: nn.Module
    ) -> tuple[Sizes, list[bool]]:
        """Of features of these shapes: the sizes of the head's maps, and which are read. One image tells, once."""
        key = (head, *(feature.shape[1:] for feature in features))
        if key not in self._seen:
            sizes: Sizes = []

            def note_sizes(maps: Sequence[Tensor], _: list) -> dict:
                sizes.extend((*level.shape[-2:],) for level in maps)
                return {}

            with torch.no_grad(), replaced(head, 'loss', note_sizes), _Read() as read:
                losses([feature.detach()[:1] for feature in features], slice(0, 1))
            self._seen[key] = sizes, [feature in read for feature in features]
        return self._seen[key]


def _positions(head: nn.Module) -> float:
    """Of all feature maps of a dense head, for one pixel of the image."""
    return sum(1 / (x * y) for x, y in head.prior_generator.strides)
