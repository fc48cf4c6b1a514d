"""Local heads of classifiers: any classification head of mmpretrain after a small network, e.g. DGL's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.dry_run import describe_error
from mmman.heads.layers import INIT, conv_bn_relu, linear_bn_relu
from mmman.local.local_head import INJECTED_ARGS, Boundary, LocalHead, drop_keys
from mmman.local.transfer import MomentumTransfer
from mmman.options import Count, checked
from mmman.registry import MODELS


class ClsLocalHead(LocalHead):
    """Transfer, then a subclass's network (:meth:`embed`), then a linear classifier built from the model's own head.

    The number of classes, loss (label smoothing, focal, multi-label), top-k and soft targets (Mixup, CutMix) are those of the
    model's head; its ``in_channels`` is replaced.

    Args:
        in_channels: Number of features that :meth:`embed` returns.
        head: Config of the model's classification head, ``_base_.model.head``: a linear one of mmpretrain.
        boundary, transfer, loss_weight, init_cfg: See :class:`LocalHead`.

    Raises:
        ConfigError: ``head`` isn't such a head, or doesn't set ``num_classes``.
    """

    task = 'classifier'
    uses_images = False

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        in_channels: int,
        loss_weight: float = 1.0,
        init_cfg: dict | list | None = INIT,
    ) -> None:
        super().__init__(boundary, transfer, loss_weight, init_cfg)
        self.num_classes = head.get('num_classes')
        self.head = _build_classifier(head, in_channels)

    @classmethod
    def derive_options(cls, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        if 'head' not in model:
            return {}
        stock = model['backbone'].get('backbone') or {}  # VGG's classifier is in the backbone
        return {'head': {**({'num_classes': stock['num_classes']} if 'num_classes' in stock else {}), **model['head']}}

    @classmethod
    def task_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        head = _linear_head(options.get('head') or {})
        return {'head': {**head, 'type': _type_name(head)}}

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Compute features for the classifier.

        Args:
            y: The transfer's output, (B, C, H, W) or (B, L, C).
            inputs: The model's input batch, (B, 3, H0, W0).

        Returns:
            (B, in_channels).
        """
        raise NotImplementedError

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The classification head's own loss; arguments as in :meth:`LocalHead.loss`."""
        return self.head.loss((self.embed(y, inputs),), data_samples)

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if the model is not a classifier, or has another number of classes."""
        super().check_model(model)
        owners = [getattr(model, name, None) for name in ('head', 'backbone')]
        theirs = next((n for owner in owners if (n := getattr(owner, 'num_classes', None)) and n > 0), None)
        if theirs not in (None, self.num_classes):
            raise ConfigError(
                f'the local head has num_classes={self.num_classes}, but the model has {theirs}: '
                f'set model.backbone.local_head.head.num_classes={theirs} as well'
            )


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class LinearLocalHead(ClsLocalHead):
    """A linear classifier on the mean of the map, or on the class token.

    Args:
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.
    """

    supports_channel_bias = True

    def __init__(self, boundary: Boundary, transfer: MomentumTransfer, head: dict, loss_weight: float = 1.0) -> None:
        super().__init__(boundary, transfer, head, boundary.channels, loss_weight)

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        return self.feature.pool(y)


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class DGLLocalHead(ClsLocalHead):
    """The auxiliary head of decoupled greedy learning (Belilovsky et al., 2020), as the local-learning papers use it.

    It consists of average pooling to 8x8, three 1x1 convolutions, global pooling and three linear layers, each with BN and
    ReLU, and the classifier. Its cost is nearly independent of the image size.

    Args:
        pool_size: Height and width that larger features are pooled to.
        conv_channels: Channels of the convolutions.
        fc_channels: Width of the linear layers.
        original: Use the network of the authors' code instead (``mlp-sr``): C channels are pooled to a quarter of their height
            and width, the convolutions keep C, their output is pooled to 2x2, and the linear layers are 4C wide.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.

    Raises:
        ConfigError: ``original`` is set together with an option of the other network.
    """

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        pool_size: Count = 8,
        conv_channels: Count = 128,
        fc_channels: Count = 512,
        original: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        channels = boundary.channels
        if original:
            if (pool_size, conv_channels, fc_channels) != (8, 128, 512):
                raise ConfigError(
                    'local_head.original=True fixes the sizes of the network: remove pool_size, conv_channels and fc_channels'
                )
            conv_channels, fc_channels = channels, 4 * channels
        super().__init__(boundary, transfer, head, fc_channels, loss_weight)
        self.pool_size = None if original else pool_size
        widths = (channels, conv_channels, conv_channels)
        self.convs = nn.Sequential(*(conv_bn_relu(width, conv_channels, 1) for width in widths))
        widths = (fc_channels if original else conv_channels, fc_channels, fc_channels)
        self.fcs = nn.Sequential(*(linear_bn_relu(width, fc_channels) for width in widths))

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        y = self.as_map(y, inputs)
        if self.pool_size is None:
            y = self.convs(F.adaptive_avg_pool2d(y, [math.ceil(size / 4) for size in y.shape[-2:]]))
            return self.fcs(F.adaptive_avg_pool2d(y, 2).flatten(1))
        y = F.adaptive_avg_pool2d(y, [min(self.pool_size, size) for size in y.shape[-2:]])
        return self.fcs(self.convs(y).mean((2, 3)))


_SIZE_OPTIONS = ('in_channels', 'hidden_dim')
_LINEAR_HEADS = {
    'ClsHead': ('LinearClsHead', ()),
    'CSRAClsHead': ('MultiLabelLinearClsHead', ('num_heads', 'lam')),
    'DeiTClsHead': ('VisionTransformerClsHead', ()),
    'MultiLabelClsHead': ('MultiLabelLinearClsHead', ()),
}
"""Heads that only hold a loss, or that take a map or the output of a particular backbone; the linear head that replaces each,
and the options that it doesn't have."""


def _linear_head(head: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the linear head that a local head builds for the model's own head, without its sizes."""
    name = _type_name(head)
    if name not in _LINEAR_HEADS:
        return drop_keys(head, _SIZE_OPTIONS)
    replacement, dropped = _LINEAR_HEADS[name]
    return {**drop_keys(head, (*_SIZE_OPTIONS, *dropped)), 'type': f'mmpretrain.{replacement}'}


def _type_name(head: Mapping[str, Any]) -> str:
    kind = head.get('type')
    return getattr(kind, '__name__', None) or str(kind).rpartition('.')[-1]


def _build_classifier(head: dict, in_channels: int) -> nn.Module:
    config, name = _linear_head(head), _type_name(head)
    if name == 'MultiTaskHead':
        raise ConfigError(
            'MultiTaskHead cannot be a local classification head: its data samples hold the labels of several tasks, and a '
            'local head learns one; train each task by a config of its own with a linear head, or all of them without mmman'
        )
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(config['type']) if isinstance(config['type'], str) else config['type']
    if cls is None or not {'in_channels', 'num_classes'} <= inspect.signature(cls).parameters.keys():
        raise ConfigError(
            f'{name} cannot be a local classification head: it is not a linear head with num_classes and in_channels; '
            f'set local_head.head to another, e.g. {_other_heads(name)}'
        )
    if not config.get('num_classes'):
        raise ConfigError(
            f'local_head.head of type {name} does not set num_classes: add it, e.g. '
            "head=dict(type='LinearClsHead', num_classes=1000, loss=...)"
        )
    try:
        built = MODELS.build({**config, 'in_channels': in_channels})
        built((next(built.parameters()).new_zeros(2, in_channels),))
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{name} cannot be a local classification head: it does not classify a vector of {in_channels} features '
            f'({describe_error(error)}); set local_head.head to another, e.g. {_other_heads(name)}'
        ) from error
    return built


def _other_heads(name: str) -> str:
    heads = ('LinearClsHead', 'MultiLabelLinearClsHead', 'VisionTransformerClsHead')
    return ', '.join(head for head in heads if head != name)
