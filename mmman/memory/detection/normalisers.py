"""What dense heads divide their losses by, taken from the whole batch while the losses are computed for a few images.

A row is keyed by the class that defines ``loss_by_feat``. Only heads whose normalisers don't depend on predictions have one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.memory.chunks import replaced
from mmman.memory.detection.anchor_targets import targets_at_once

Sizes = list[tuple[int, int]]
Show = Callable[[slice], None]
"""Says which images' losses are computed next."""


def check_chunks(head: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Raise :class:`MisuseError` where losses of a dense head can't be computed for a few images at a time.

    Args:
        head: The dense head.
        modules: All modules that would run on a few images.
    """
    if _row(head) is None:
        raise MisuseError(
            f'{type(head).__name__} cannot run on a few images at a time: what it divides its losses by is not known for the '
            f'whole batch in advance. Known are the heads that compute their loss as {", ".join(sorted(_ROWS))}; '
            'set optim_wrapper.images_per_chunk=None'
        )
    norms = (part for module in modules for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    if any(norm.training for norm in norms):
        raise MisuseError(
            f'{type(head).__name__}, or the neck before it, has BatchNorm in training mode, which mixes the images of a batch: '
            'set optim_wrapper.images_per_chunk=None, or use GroupNorm'
        )


def batch_normalisers(head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> AbstractContextManager[Show]:
    """While this context is open, ``head`` normalises the losses of some images as if they came with the whole batch.

    The context's value is to be called with every slice of the batch, before the losses of its images are computed.

    Args:
        head: A dense head that :func:`check_chunks` accepts.
        sizes: Height and width of its feature maps, by level.
        data_samples: All data samples of the batch.
        like: A tensor that tells device and dtype.
    """
    return _row(head)(head, sizes, data_samples, like)


@contextmanager
def _targets_of_batch(head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> Iterator[Show]:
    """Targets, and with them the number to divide by, are computed once for all images, and handed out for some."""
    from mmdet.models.utils import unpack_gt_instances

    instances, ignored, metas = unpack_gt_instances(data_samples)
    with targets_at_once(head):
        anchors, flags = head.get_anchors(sizes, metas, device=like.device)
        *by_level, factor = head.get_targets(anchors, flags, instances, metas, batch_gt_instances_ignore=ignored)
    span = slice(0)

    def show(images: slice) -> None:
        nonlocal span
        span = images

    def anchors_of_span(*_: object, **__: object) -> tuple:
        return anchors[span], flags[span]

    def targets_of_span(*_: object, **__: object) -> tuple:
        return (*([level[span] for level in levels] for levels in by_level), factor)

    with replaced(head, 'get_anchors', anchors_of_span), replaced(head, 'get_targets', targets_of_span):
        yield show


@contextmanager
def _means_over_ranks(head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> Iterator[Show]:
    """Every number to divide by goes through ``reduce_mean``: once with the whole batch and predictions that are all zero."""
    from mmdet.models.utils import unpack_gt_instances

    module = sys.modules[_owner(head).__module__]
    reduce_mean, means = module.reduce_mean, []

    def note(value: Tensor) -> Tensor:
        means.append(reduce_mean(value).clone())
        return means[-1].clone()

    channels = [head.num_base_priors * width for width in (head.cls_out_channels, 4, 1)]
    predictions = [[like.new_zeros(1).expand(len(data_samples), c, *size) for size in sizes] for c in channels]
    losses = [part for name, part in head.named_children() if name.startswith('loss_')]
    instances, ignored, metas = unpack_gt_instances(data_samples)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(replaced(module, 'reduce_mean', note))
        for loss in losses:
            stack.enter_context(replaced(loss, 'forward', lambda prediction, *_, **__: prediction.new_zeros(())))
        head.loss_by_feat(*predictions, instances, metas, ignored)

    def replayed(_: Tensor) -> Tensor:
        means.append(means.pop(0))
        return means[-1].clone()

    with replaced(module, 'reduce_mean', replayed):
        yield lambda images: None


_ROWS: dict[str, Callable[..., AbstractContextManager[Show]]] = {
    'mmdet.models.dense_heads.anchor_head.AnchorHead': _targets_of_batch,
    'mmdet.models.dense_heads.atss_head.ATSSHead': _means_over_ranks,
    'mmdet.models.dense_heads.fcos_head.FCOSHead': _means_over_ranks,
}


def _owner(head: nn.Module) -> type | None:
    return next((cls for cls in type(head).__mro__ if 'loss_by_feat' in vars(cls)), None)


def _row(head: nn.Module) -> Callable[..., AbstractContextManager[Show]] | None:
    owner = _owner(head)
    return owner and _ROWS.get(f'{owner.__module__}.{owner.__qualname__}')
