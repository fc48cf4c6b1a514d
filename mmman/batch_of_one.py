"""BatchNorm in local heads on a batch of one image, where a channel may have a single value and so no variance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmman.errors import ConfigError


@contextmanager
def use_running_stats_for_batch_of_one(head: nn.Module) -> Iterator[None]:
    """While this context is open, BatchNorm layers of ``head`` that get one value per channel use their running statistics.

    PyTorch rejects such an input in training. A batch of one image produces it where features are pooled to one pixel. The
    layer then normalises as in eval mode and does not update its running statistics. Any other input is normalised as usual.
    SyncBatchNorm over several processes is not affected.

    Args:
        head: A local head. Keep the context open for its backward pass, in which units may be recomputed.

    Raises:
        ConfigError: In the context, if such a layer keeps no running statistics.
    """
    switched: set[nn.Module] = set()

    def enter(layer: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0]
        if not layer.training or x.numel() != x.shape[1] or _is_synchronised(layer):
            return
        if layer.running_mean is None:
            raise ConfigError(
                'a BatchNorm layer of a local head keeps no running statistics (track_running_stats=False), so it cannot '
                'normalise a batch of one image: use larger batches, set drop_last=True, or use another norm layer'
            )
        switched.add(layer)
        layer.training = False

    def leave(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if layer in switched:
            switched.remove(layer)
            layer.training = True

    with ExitStack() as stack:
        for layer in head.modules():
            if isinstance(layer, _BatchNorm):
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield


def _is_synchronised(layer: nn.Module) -> bool:
    if not (isinstance(layer, nn.SyncBatchNorm) and dist.is_initialized()):
        return False
    return dist.get_world_size(layer.process_group) > 1
