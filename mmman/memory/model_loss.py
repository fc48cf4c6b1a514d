"""Run whatever follows the backbone of a model on a few images at a time."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.model import BaseModel
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mmman.errors import ConfigError
from mmman.memory.chunks import Losses, replaced, run_in_chunks
from mmman.memory.detection.dense_loss import ChunkedLoss, DenseLoss, why_not_dense
from mmman.memory.detection.losses import check_norms


class ModelLoss(ChunkedLoss):
    """A :class:`ChunkedLoss` of any model that runs its backbone once: two-stage, mask and query-based detectors.

    Each chunk's losses are normalised by the chunk itself, and averaged with the numbers of images as weights: the training is
    that of the same images spread over more GPUs.

    Raises:
        ConfigError: In a step: a norm layer behind the backbone mixes the images of a batch, or the model's loss doesn't run
            the backbone exactly once.
    """

    def task_losses(self, inputs: Tensor, data_samples: list) -> Losses:
        features, structure = tree_flatten(self.model.backbone(inputs))
        return self._losses(features, structure, inputs, data_samples)

    def neck_and_head(self, features: list[Tensor], inputs: Tensor, data_samples: list, dry_run: bool = False) -> Losses:
        return {} if dry_run else self._losses(*tree_flatten(tuple(features)), inputs, data_samples)

    def _losses(self, features: list[Tensor], structure: TreeSpec, inputs: Tensor, data_samples: list) -> Losses:
        model, backbone = self.model, self.model.backbone
        check_norms(type(model).__name__, [part for part in model.children() if part is not backbone])
        in_backbone = {*backbone.parameters()}
        parameters = [p for p in model.parameters() if p.requires_grad and p not in in_backbone]

        def compute(leaves: list[Tensor], span: slice) -> tuple[Tensor, Losses]:
            outputs = _Outputs(tree_unflatten(leaves, structure))
            with replaced(backbone, 'forward', outputs):
                losses = type(model).loss(model, inputs[span], data_samples[span])
            if outputs.reads != 1:
                raise ConfigError(
                    f'images_per_chunk requires a model whose loss runs its backbone once, but {type(model).__name__} ran it '
                    f'{outputs.reads} times: set optim_wrapper.images_per_chunk=None'
                )
            loss, log = model.parse_losses(losses)
            fraction = len(data_samples[span]) / len(data_samples)
            return loss * fraction, {name: value * fraction for name, value in log.items() if name != 'loss'}

        size = self.chunk_size or len(data_samples)
        return run_in_chunks(compute, features, parameters, size, self._scale_loss(features[-1].new_ones(())))


class _Outputs:
    """A backbone's ``forward`` that returns outputs which are there already."""

    def __init__(self, outputs: object) -> None:
        self.outputs, self.reads = outputs, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.reads += 1
        return self.outputs


def chunked_loss(model: BaseModel, chunk_size: int, scale_loss: Callable[[Tensor], Tensor]) -> ChunkedLoss:
    """Choose how to compute a model's losses in chunks: those of the whole batch if they can be known, else by chunk.

    Args:
        model: The model.
        chunk_size: Images per chunk.
        scale_loss: Scales a loss as the loss scaler does.
    """
    return (ModelLoss if why_not_dense(model) else DenseLoss)(model, chunk_size, scale_loss)
