"""The local head of segmentors: any single-level decode head of mmseg and, for InfoPro, a reconstruction of the image."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.dry_run import BATCH_SIZE, DryRunError, describe_error, parameters_without_grad
from mmman.heads.reconstruction import ReconstructionDecoder, ReconstructionTarget, reconstruction_loss
from mmman.local.local_head import INJECTED_ARGS, Boundary, LocalHead
from mmman.local.transfer import MomentumTransfer
from mmman.options import NonNegative, checked
from mmman.registry import MODELS

SHARED_OPTIONS = ('num_classes', 'ignore_index', 'align_corners')
"""Options that a local head takes from the model's own decode head, whatever its kind."""
PIXEL_OPTIONS = ('out_channels', 'threshold', 'sampler', 'loss_decode', 'norm_cfg')
"""Further options, only from a head that classifies pixels. They mean other things in one that predicts masks (Mask2Former)."""

FCN = {'type': 'mmseg.FCNHead', 'channels': 256, 'num_convs': 1, 'concat_input': False}
"""A 3x3 convolution with norm and ReLU, dropout, a 1x1 convolution."""


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class SegLocalHead(LocalHead):
    """Transfer, then a decode head and, as an option, a reconstruction decoder (InfoPro, InfoPro + MAN++ on Cityscapes).

    ``lambda_task * (the decode head's losses) + lambda_rec * BCE(reconstruction, image)``. Classes, ignored index,
    ``align_corners``, pixel sampler (OHEM), losses with their class weights, and norm layers are those of the model's own head.

    Args:
        decode_head: Config of the model's decode head, ``_base_.model.decode_head``. For a cascade the last head is used, for
            K-Net the head that generates its kernels.
        network: Config of the local decode head, without the options shared with the model's: a single-level head of mmseg.
            Default: an FCN head with one 3x3 convolution to 256 channels.
        lambda_rec: Weight of the reconstruction: a number, or a pair (first, last) for a weight that depends on the stage; see
            :meth:`mmman.local.Boundary.interpolate`. 0 disables it. InfoPro on Cityscapes: 1.5.
        lambda_task: Weight of the decode head's losses, in the same format.
        pixel_range: With a reconstruction, the lowest and the highest value of a pixel in the images that the data preprocessor
            gets; see :class:`mmman.heads.reconstruction.ReconstructionTarget`.
        boundary, transfer, loss_weight: See :class:`LocalHead`.

    Raises:
        ConfigError: ``decode_head`` doesn't set ``num_classes``; or ``network``, which the message names, needs several feature
            levels or another head's prediction, or its losses fail in a dry run.
    """

    task = 'segmentor'

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        decode_head: dict | Sequence[dict],
        network: dict | None = None,
        lambda_rec: NonNegative | tuple[NonNegative, NonNegative] = 0.0,
        lambda_task: NonNegative | tuple[NonNegative, NonNegative] = 1.0,
        pixel_range: tuple[float, float] = (0, 255),
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(boundary, transfer, loss_weight)
        shared = _shared_options(decode_head)
        if 'num_classes' not in shared:
            raise ConfigError(
                f'the decode head {_name(_own_head(decode_head))} does not set num_classes, which the local head requires: set '
                'model.backbone.local_head.decode_head=dict(num_classes=...), and ignore_index, align_corners and loss_decode '
                'if they differ from the defaults'
            )
        config = {
            **shared,
            **copy.deepcopy(network or FCN),
            'in_channels': boundary.channels,
            'in_index': 0,
        }
        self.decode_head = _build_single_level_head(config, is_default=network is None)
        untrained = _find_untrained(config, is_default=network is None)
        for parameter in untrained:
            self.decode_head.get_parameter(parameter).requires_grad_(False)
        if untrained:
            print_log(
                f'{type(self.decode_head).__name__} after {self.unit} has parameters that its own loss does not train, '
                f'which are now frozen: {", ".join(untrained)}',
                logger='current',
            )
        self.lambda_task = boundary.interpolate(lambda_task)
        self.lambda_rec = boundary.interpolate(lambda_rec)
        self.decoder, self.target = None, None
        if self.lambda_rec:
            self.decoder = ReconstructionDecoder(boundary.channels, boundary.stride, True, boundary.image_channels)
            self.target = ReconstructionTarget(pixel_range, boundary.image_channels)
        self.uses_images = self.decoder is not None

    @classmethod
    def derive_options(cls, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        return {'decode_head': model['decode_head']} if 'decode_head' in model else {}

    @classmethod
    def task_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {'decode_head': _shared_options(options.get('decode_head') or {})}

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The decode head's losses and accuracy, and ``loss_rec``, weighted; arguments as in :meth:`LocalHead.loss`."""
        y = self.as_map(y, inputs)
        losses = self.decode_head.loss((y,), data_samples, {})
        losses = {name: self.lambda_task * value if 'loss' in name else value for name, value in losses.items()}
        if self.decoder is not None:
            images = self.target(inputs, self.session.model.data_preprocessor)
            logits = self.decoder(y, inputs.shape[-2:])
            losses['loss_rec'] = self.lambda_rec * reconstruction_loss(logits, images, data_samples)
        return losses

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if the task or the classes differ, or the images can't be restored."""
        super().check_model(model)
        theirs = getattr(model, 'num_classes', None)
        if theirs not in (None, self.decode_head.num_classes):
            raise ConfigError(
                f'the local head has num_classes={self.decode_head.num_classes}, but the model has {theirs}: '
                f'set model.backbone.local_head.decode_head.num_classes={theirs} as well'
            )
        if self.target is not None:
            self.target.check_model(model)


def _own_head(decode_head: dict | Sequence[dict]) -> dict:
    """Config of the head whose options local heads share: of a cascade its last, of K-Net the one that makes its kernels."""
    own = decode_head[-1] if isinstance(decode_head, (list, tuple)) else decode_head
    return own if 'num_classes' in own else own.get('kernel_generate_head', own)


def _shared_options(decode_head: dict | Sequence[dict]) -> dict:
    """Options of the model's own head on classes, labels and losses that local heads take."""
    own = _own_head(decode_head)
    names = SHARED_OPTIONS + (PIXEL_OPTIONS if _classifies_pixels(own) else ())
    return {name: copy.deepcopy(own[name]) for name in names if name in own}


def _classifies_pixels(decode_head: dict) -> bool:
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    cls = decode_head.get('type')
    if isinstance(cls, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            cls = registry.get(cls)
    return cls is None or issubclass(cls, BaseDecodeHead)


def _name(decode_head: dict) -> str:
    kind = decode_head.get('type', 'without a type')
    return kind.rpartition('.')[-1] if isinstance(kind, str) else kind.__name__


def _build_single_level_head(config: dict, is_default: bool) -> nn.Module:
    from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    reason = None
    try:
        head = MODELS.build(config)
    except Exception as error:  # a third party's constructor may fail in any way
        reason = f'it cannot be built for one feature map ({describe_error(error)})'
    else:
        if not isinstance(head, BaseDecodeHead) or isinstance(head, BaseCascadeDecodeHead):
            reason = 'it is not a decode head that predicts from features alone'
        elif head.input_transform is not None:
            reason = 'it requires several feature levels'
        elif getattr(head, 'c1_bottleneck', None) is not None:
            reason = 'it requires low-level features: set c1_in_channels=0, c1_channels=0'
    if reason:
        raise ConfigError(_unsupported_message(config, reason, is_default))
    return head


def _find_untrained(config: dict, is_default: bool) -> tuple[str, ...]:
    """Parameters that the decode head's losses don't train. Rejects a head whose losses fail."""
    scope = DefaultScope.get_current_instance()
    key = repr((config, scope and scope.scope_name))
    if key not in _UNTRAINED:
        try:
            _UNTRAINED[key] = parameters_without_grad(partial(MODELS.build, copy.deepcopy(config)), _dry_run_losses)
        except DryRunError as error:
            raise ConfigError(_unsupported_message(config, f'it fails on one feature map ({error})', is_default)) from error
    return _UNTRAINED[key]


def _unsupported_message(config: dict, reason: str, is_default: bool) -> str:
    name = _name(config)
    if is_default:
        advice = (
            "it does not support the options of the model's head: set local_head.decode_head=dict(num_classes=..., "
            'loss_decode=...), or local_head.network'
        )
    else:
        others = [head for head in ('FCNHead', 'ASPPHead', 'PSPHead') if head != name]
        advice = f'set local_head.network to another, e.g. {", ".join(others)}'
    return f'{name} cannot be a local segmentation head: {reason}; {advice}'


_UNTRAINED: dict[str, tuple[str, ...]] = {}
"""Results of dry runs by decode-head config. They are the same for every model in a process."""


def _dry_run_losses(head: nn.Module) -> Iterator[dict]:
    """Losses of a decode head on a random map, with random labels."""
    from mmseg.structures import SegDataSample

    device = head.conv_seg.weight.device
    labels = torch.randint(head.num_classes, (BATCH_SIZE, 1, 64, 64), device=device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    yield head.loss((torch.randn(BATCH_SIZE, head.in_channels, 16, 16, device=device),), samples, {})
