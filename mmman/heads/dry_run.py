"""Run a training step of a task head on random features before it is used: check its loss and find untrained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.messages import one_line

if TYPE_CHECKING:
    from mmdet.structures.mask import BitmapMasks

BATCH_SIZE = 2
"""Number of images in a batch: one is too few for BatchNorm after global pooling."""


class DryRunError(ConfigError):
    """Raised when a head can't be built or its loss fails. The message is the reason, on one line."""


def parameters_without_grad(build: Callable[[], nn.Module], losses: Callable[[nn.Module], Iterable[dict]]) -> tuple[str, ...]:
    """Run the losses of a head forward and backward, and return the parameters that get no gradient.

    A temporary head is built for this on the CPU (on the GPU in a job over NCCL, because losses may be averaged over
    processes). The random state doesn't change.

    Args:
        build: Builds the head.
        losses: Yields the head's losses by name, batch by batch.

    Returns:
        Names of the parameters that get no gradient from any batch.

    Raises:
        DryRunError: The head can't be built, or one of its losses fails.
    """
    device = get_device() if dist.is_initialized() and 'gloo' not in dist.get_backend() else 'cpu'
    devices = [torch.cuda.current_device()] if device == 'cuda' else []
    with torch.random.fork_rng(devices=devices), torch.device('cpu'), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every GPU
        try:
            head = revert_sync_batchnorm(build()).to(device).train()
            for batch in losses(head):
                total_loss(batch).backward()
        except Exception as error:  # a third party's loss may fail in any way
            raise DryRunError(describe_error(error)) from error
    return tuple(name for name, p in head.named_parameters() if p.requires_grad and p.grad is None)


def total_loss(losses: dict[str, Tensor | list[Tensor]]) -> Tensor:
    """The sum of the losses among a head's outputs, computed as in a model's ``parse_losses``."""
    summed = [value for name, value in losses.items() if 'loss' in name]
    return sum(part.mean() for value in summed for part in (value if isinstance(value, (list, tuple)) else [value]))


def describe_error(error: BaseException) -> str:
    """The type and message of an error on one line."""
    return one_line(f'{type(error).__name__}: {error}', 240)


def detection_samples(
    side: int, classes: int, device: torch.device | str = 'cpu', objects_per_side: int = 5, masks: bool = False
) -> list:
    """Create data samples of :data:`BATCH_SIZE` square images with objects of all sizes.

    Args:
        side: Height and width of the images, in pixels.
        classes: Number of classes.
        device: Device of the tensors.
        objects_per_side: Maximum number of objects of one size along a side, without overlap; 0: no objects.
        masks: Whether the objects have masks, as in data for instance segmentation.
    """
    from mmdet.structures import DetDataSample

    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512) if size <= side]
    boxes = torch.cat([_grid_boxes(size, side, objects_per_side) for size in sizes])
    samples = []
    for i in range(BATCH_SIZE):
        shape = (side, side)
        meta = {'img_shape': shape, 'pad_shape': shape, 'ori_shape': shape, 'batch_input_shape': shape, 'img_id': i}
        sample = DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0), 'flip': False})
        labels = torch.arange(len(boxes)) % classes
        sample.gt_instances = InstanceData(bboxes=boxes.to(device), labels=labels.to(device))
        if masks:
            sample.gt_instances.masks = box_masks(boxes, side, side)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0].to(device), labels=labels[:0].to(device))
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(2, (1, side, side)).to(device))
        samples.append(sample)
    return samples


def _grid_boxes(size: int, side: int, objects_per_side: int) -> Tensor:
    """Boxes of one size, (N, 4), in rows and columns without overlap."""
    positions = torch.linspace(0, side - size, min(objects_per_side, max(1, side // size)))
    corners = torch.cartesian_prod(positions, positions)
    return torch.cat([corners, corners + size], 1)


def predicts_masks(model: nn.Module) -> bool:
    """Whether a detector needs masks in its data, by the names of its modules."""
    return any('mask' in name for name, _ in model.named_modules())


def box_masks(boxes: Tensor, height: int, width: int) -> BitmapMasks:
    """Masks that fill the boxes (N, 4) in an image."""
    from mmdet.structures.mask import BitmapMasks

    across, down = (
        (centres >= boxes[:, i, None]) & (centres < boxes[:, i + 2, None])
        for i, centres in enumerate((torch.arange(width) + 0.5, torch.arange(height) + 0.5))
    )
    return BitmapMasks((down[:, :, None] & across[:, None]).numpy().astype('uint8'), height, width)
