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

DETECTED = 0.3
"""Probability above which an anchor, point or proposal counts as a detection."""


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
        model: A classifier; or a detector of mmdet with a dense head, or with a box head on proposals. In eval mode.
        inputs: Preprocessed images, (B, 3, H, W).
        data_samples: Their data samples.
        label: The class. None: the one that a classifier predicts; every class of a detector.

    Returns:
        The sum over the batch of a classifier's logits of the class. For a detector, the sum of the probabilities of the class
        above :data:`DETECTED`, over all anchors, points or proposals: before non-maximum suppression, without centerness or
        objectness. None if there are none.

    Raises:
        ConfigError: The model is neither, or has no such class.
    """
    outputs = model(inputs, data_samples, mode='tensor')
    is_detector = any(cls.__name__ == 'BaseDetector' for cls in type(model).__mro__)
    scores = _probabilities(model, outputs) if is_detector else outputs
    if isinstance(scores, (tuple, list)) and scores:
        scores = scores[-1]
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise ConfigError(
            'Grad-CAM explains classifiers, which return (images, classes), and detectors of mmdet with a dense head or a box '
            f'head on proposals, not {type(model).__name__}'
        )
    if label is not None and not 0 <= label < scores.shape[1]:
        raise ConfigError(f'the model has {scores.shape[1]} classes, so --class is a number from 0 to {scores.shape[1] - 1}')
    if not is_detector:
        return (scores.amax(1) if label is None else scores[:, label]).sum()
    detected = scores if label is None else scores[:, label]
    detected = detected[detected > DETECTED]
    return detected.sum() if len(detected) else None


def _probabilities(model: BaseModel, outputs: tuple) -> Tensor | None:
    """Probabilities (anchors, points or proposals of all images, classes) of a detector's raw outputs; None if not known."""
    roi_head, head = getattr(model, 'roi_head', None), getattr(model, 'bbox_head', None)
    if roi_head is not None:
        logits = outputs[0][0] if isinstance(outputs[0], tuple) else None
        return logits.softmax(1)[:, :-1] if isinstance(logits, Tensor) else None
    levels = outputs[0] if isinstance(outputs, tuple) else ()
    channels = getattr(head, 'cls_out_channels', None)
    if channels is None or not all(isinstance(level, Tensor) and level.dim() == 4 for level in levels):
        return None
    logits = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in levels])
    return logits.sigmoid() if getattr(head, 'use_sigmoid_cls', True) else logits.softmax(1)[:, :-1]
