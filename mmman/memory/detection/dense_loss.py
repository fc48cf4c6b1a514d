"""Run what follows the backbone, and the dense heads of local heads, on a few images at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmman.errors import ConfigError
from mmman.memory.chunks import Losses, run_in_chunks
from mmman.memory.detection.losses import (
    BatchLoss,
    Sizes,
    batch_loss,
    check_norms,
    dense_head_losses,
    has_adapter,
    map_sizes,
    packed_head,
)
from mmman.memory.detection.packed_head import PackedHead

if TYPE_CHECKING:
    from mmman.local.local_head import LocalHead


class _ReadTracker(TorchDispatchMode):
    """Tracks which tensors, or views of them, operators read while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            tensors = (leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor))
            self._storages.update(tensor.untyped_storage()._cdata for tensor in tensors)
        return func(*args, **(kwargs or {}))


class DenseLocalHead(Protocol):
    """A local head whose loss is that of a dense head on feature maps made from the block's output.

    Attributes:
        dense_head: The dense head of mmdet.
        transfer: The momentum transfer, which runs first, on the whole batch.
        gt_size_range: Objects that :meth:`filter_gt` keeps: lower and upper bound of the square root of a box's area, in
            pixels. None: all.
    """

    dense_head: nn.Module
    transfer: nn.Module
    gt_size_range: tuple[float, float] | None

    def feature_maps(self, y: Tensor, inputs: Tensor) -> Sequence[Tensor]:
        """Compute the dense head's feature maps from the transfer's output for the block."""

    def filter_gt(self, data_samples: list) -> list:
        """Return the data samples with only the objects that this head learns to detect."""

    def children(self) -> Iterable[nn.Module]: ...


MakeLoss = Callable[['DenseLocalHead | None', nn.Module, list, Sizes, Tensor], BatchLoss]
"""Makes the loss of a batch from a local head or None, its dense head, and the arguments of :class:`BatchLoss`."""


def make_batch_loss(owner: DenseLocalHead | None, head: nn.Module, data_samples: list, sizes: Sizes, like: Tensor) -> BatchLoss:
    """Make the loss of a batch, with its targets."""
    return batch_loss(head, sizes, data_samples if owner is None else owner.filter_gt(data_samples), like)


class ChunkedLoss:
    """Computes the losses of a model and of its local heads in chunks of a batch.

    A :class:`mmman.local.session.StepStrategy`. Values and gradients of local heads equal those of the whole batch.

    Args:
        model: The model.
        chunk_size: Images per chunk of what follows the backbone. None: the whole batch in one pass.
        scale_loss: Scales a loss as the loss scaler does.
        make_loss: Makes the loss of a batch of a dense head.
    """

    def __init__(
        self,
        model: BaseModel,
        chunk_size: int | None,
        scale_loss: Callable[[Tensor], Tensor],
        make_loss: MakeLoss = make_batch_loss,
    ) -> None:
        self.model, self.chunk_size, self._scale_loss, self._make_loss = model, chunk_size, scale_loss, make_loss
        self._probed: dict[tuple, tuple[Sizes, list[bool]]] = {}

    def task_losses(self, inputs: Tensor, data_samples: list) -> Losses:
        """Replaces the model's ``loss``. Takes the same arguments and returns the same result."""
        return self.neck_and_head([*self.model.backbone(inputs)], inputs, data_samples)

    def neck_and_head(self, features: list[Tensor], inputs: Tensor, data_samples: list, dry_run: bool = False) -> Losses:
        """Compute the model's losses from the outputs of its backbone. May free the ``features`` that nothing reads.

        Args:
            features: Each (B, C, H, W). The list may be modified in place.
            inputs: The images, (B, 3, H, W).
            data_samples: Data samples of the batch.
            dry_run: Only determine, once, which features of these shapes are needed, and return no losses.
        """
        raise NotImplementedError

    def local_losses(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list, dry_run: bool = False) -> Losses:
        """Replaces ``head.loss`` and computes it in chunks, each with as many positions as a chunk of the model's own head.

        Takes the same arguments and returns the same result; ``dry_run`` is as in :meth:`neck_and_head`.
        """
        dense = getattr(head, 'dense_head', None)
        if dense is None or not has_adapter(dense):
            return {} if dry_run else head.loss(y, inputs, data_samples)
        chunk_size = len(data_samples)
        if self.chunk_size is not None:
            chunk_size = max(1, int(self.chunk_size * self._relative_positions(dense)))
        if chunk_size >= len(data_samples):
            if dry_run:
                return {}
            return self._in_one_pass(head, dense, head.feature_maps(y, inputs), data_samples)
        modules = [part for part in head.children() if part is not head.transfer]
        return self._run(
            head, lambda leaves: head.feature_maps(leaves[0], inputs), [y], modules, dense, data_samples, chunk_size, dry_run
        )

    def _run(
        self,
        owner: DenseLocalHead | None,
        make_feature_maps: Callable[[list[Tensor]], Sequence[Tensor]],
        features: list[Tensor],
        modules: list[nn.Module],
        head: nn.Module,
        data_samples: list,
        chunk_size: int,
        dry_run: bool,
    ) -> Losses:
        check_norms(type(head).__name__, modules)
        sizes, is_read = self._probe(make_feature_maps, features, head)
        if dry_run:
            return {}
        # free the features that neck and head don't read: nothing else refers to them
        features[:] = [
            feature if read else feature.new_zeros(()).expand(feature.shape)
            for feature, read in zip(features, is_read, strict=True)
        ]

        def compute(leaves: list[Tensor], span: slice) -> tuple[Tensor, Losses]:
            loss, log = self.model.parse_losses(losses((packed or head)(make_feature_maps(leaves)), span))
            fraction = len(leaves[0]) / len(data_samples)
            return loss, {n: v if 'loss' in n else v * fraction for n, v in log.items() if n != 'loss'}

        packed = packed_head(head, sizes, features[-1].device)
        losses = self._batch_loss(owner, head, packed, data_samples, sizes, features[-1])
        parameters = [parameter for parameter in nn.ModuleList(modules).parameters() if parameter.requires_grad]
        return run_in_chunks(compute, features, parameters, chunk_size, self._scale_loss(features[-1].new_ones(())))

    def _in_one_pass(
        self, owner: DenseLocalHead | None, head: nn.Module, feature_maps: Sequence[Tensor], data_samples: list
    ) -> Losses:
        packed = packed_head(head, map_sizes(feature_maps), feature_maps[0].device)
        make_loss = partial(self._batch_loss, owner, head, packed, data_samples)
        return dense_head_losses(packed or head, feature_maps, make_loss)

    def _batch_loss(
        self,
        owner: DenseLocalHead | None,
        head: nn.Module,
        packed: PackedHead | None,
        data_samples: list,
        sizes: Sizes,
        like: Tensor,
    ) -> BatchLoss:
        loss = self._make_loss(owner, head, data_samples, sizes, like)
        if packed is not None:
            loss.pack_(packed)
        return loss

    def _relative_positions(self, dense: nn.Module) -> float:
        """Positions on the maps of the model's own dense head (or RPN), as a multiple of those of a local head's."""
        own = getattr(self.model, 'bbox_head', None) or getattr(self.model, 'rpn_head', None)
        return _positions(own) / _positions(dense) if hasattr(own, 'prior_generator') else 1.0

    def _probe(
        self, make_feature_maps: Callable[[list[Tensor]], Sequence[Tensor]], features: list[Tensor], head: nn.Module
    ) -> tuple[Sizes, list[bool]]:
        """Sizes of the head's maps for features of these shapes, and which features are read. Probed once, on one image."""
        key = (head, *(feature.shape[1:] for feature in features))
        if key not in self._probed:
            with torch.no_grad(), _ReadTracker() as read:
                sizes = map_sizes(make_feature_maps([feature.detach()[:1] for feature in features]))
            self._probed[key] = sizes, [feature in read for feature in features]
        return self._probed[key]


class DenseLoss(ChunkedLoss):
    """A :class:`ChunkedLoss` of a single-stage detector. Values and gradients equal those of the whole batch.

    Raises:
        ConfigError: The model doesn't compute its loss as mmdet's ``SingleStageDetector``.
    """

    def __init__(
        self,
        model: BaseModel,
        chunk_size: int | None,
        scale_loss: Callable[[Tensor], Tensor],
        make_loss: MakeLoss = make_batch_loss,
    ) -> None:
        super().__init__(model, chunk_size, scale_loss, make_loss)
        if reason := why_not_dense(model):
            raise ConfigError(reason)

    def neck_and_head(self, features: list[Tensor], inputs: Tensor, data_samples: list, dry_run: bool = False) -> Losses:
        model = self.model
        if self.chunk_size is None:
            feature_maps = self._neck(features)
            features.clear()
            return self._in_one_pass(None, model.bbox_head, feature_maps, data_samples)
        modules = [part for name, part in model.named_children() if name not in ('backbone', 'data_preprocessor')]
        return self._run(None, self._neck, features, modules, model.bbox_head, data_samples, self.chunk_size, dry_run)

    def _neck(self, features: list[Tensor]) -> Sequence[Tensor]:
        return self.model.neck(tuple(features)) if self.model.with_neck else tuple(features)


def why_not_dense(model: BaseModel) -> str:
    """Say why :class:`DenseLoss` can't compute the losses of a model. Empty if it can."""
    for method in ('loss', 'extract_feat'):
        owner = next((cls.__name__ for cls in type(model).__mro__ if method in vars(cls)), None)
        if owner != 'SingleStageDetector':
            return f'{type(model).__name__} does not compute its loss as SingleStageDetector does'
    if not has_adapter(model.bbox_head):
        name = type(model.bbox_head).__name__
        return f'the normaliser of the losses of {name} is not known for the whole batch in advance'
    return ''


def _positions(head: nn.Module) -> float:
    """Number of positions on all feature maps of a dense head, per pixel of the image."""
    return sum(1 / (x * y) for x, y in head.prior_generator.strides)
