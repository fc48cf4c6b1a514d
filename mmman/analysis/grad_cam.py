"""Grad-CAM: which places of a unit's output raise a score (Selvaraju et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmman.analysis.unit_outputs import unit_outputs
from mmman.errors import ConfigError
from mmman.partition import Feature, Unit


def grad_cam(
    backbone: nn.Module, unit: Unit, feature: Feature, inputs: Tensor, score: Callable[[Tensor], Tensor | None]
) -> Tensor:
    """The Grad-CAM map ``ReLU(sum_c w_c A_c)`` of a unit's output A, with ``w_c`` the mean of ``d score / d A_c`` over the map.

    Args:
        backbone: A stock backbone in eval mode: a localised one must be given to :func:`mmman.delocalize_` first.
        unit: The unit, of the backbone's chain.
        feature: The shape of its output. Tokens become a map, without class tokens.
        inputs: Preprocessed images, (B, 3, H, W). Each must affect its own summand of the score only.
        score: Runs the model on its argument, which equals ``inputs``. Returns a scalar, or None if it detects nothing.

    Returns:
        (B, H, W) from 0 to 1, each map divided by its maximum. 0 everywhere without a score, or if no place raises it.

    Raises:
        ConfigError: The unit's output doesn't affect the score.
    """
    with torch.enable_grad(), unit_outputs(backbone, [unit]) as outputs:
        value = score(inputs.detach().clone().requires_grad_())  # a gradient reaches the units of a frozen backbone, too
        if value is None:
            return inputs.new_zeros(len(inputs), *inputs.shape[-2:])
        output = outputs[unit.name]
        gradient = torch.autograd.grad(value, output, allow_unused=True)[0]
    if gradient is None:
        raise ConfigError(f'the output of {unit.name} does not affect the score: choose an earlier unit (--unit)')
    size = inputs.shape[-2:]
    output, gradient = (feature.as_map(x.detach(), size) for x in (output, gradient))
    maps = (gradient.mean((2, 3), keepdim=True) * output).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, size=size, mode='bilinear', align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def class_score(model: BaseModel, inputs: Tensor, data_samples: list | None, label: int | None = None) -> Tensor | None:
    """The score that Grad-CAM explains.

    Args:
        model: A classifier, or a detector of mmdet, in eval mode.
        inputs: Preprocessed images, (B, 3, H, W).
        data_samples: Their data samples.
        label: The class. None: the one that a classifier predicts; every class of a detector.

    Returns:
        The sum over the batch of a classifier's logits of the class, or of the scores of a detector's detections of it. None if
        there are no such detections.

    Raises:
        ConfigError: The model is neither, or has no such class.
    """
    if any(cls.__name__ == 'BaseDetector' for cls in type(model).__mro__):
        found = [sample.pred_instances for sample in model(inputs, data_samples, mode='predict')]
        scores = torch.cat([one.scores if label is None else one.scores[one.labels == label] for one in found])
        return scores.sum() if len(scores) else None
    logits = model(inputs, data_samples, mode='tensor')
    logits = logits[-1] if isinstance(logits, (tuple, list)) and logits else logits
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(
            f'Grad-CAM explains classifiers, which return (images, classes), and detectors of mmdet, not {type(model).__name__}'
        )
    if label is not None and not 0 <= label < logits.shape[1]:
        raise ConfigError(f'the model has {logits.shape[1]} classes, so --class is a number from 0 to {logits.shape[1] - 1}')
    return (logits.amax(1) if label is None else logits[:, label]).sum()
