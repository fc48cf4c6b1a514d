"""The local head of vision transformers."""

from __future__ import annotations

import copy
from functools import partial

from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.local.heads.base import Boundary
from mmman.local.heads.cls import ClsLocalHead
from mmman.local.recompute import Recomputed
from mmman.local.transfer import MomentumTransfer
from mmman.registry import MODELS


@MODELS.register_module()
class ViTLocalHead(ClsLocalHead):
    """Transfer, one more learnable layer, LayerNorm, class token, linear classifier (MAN++ on ViT).

    The layer is built like the unit that runs next in the backbone on what the head sees; where none follows there is none.
    Without a class token (Swin, ``with_cls_token=False``) the mean of the patch tokens is classified. Where it is the class
    token, nothing else is computed of the last layer's feed-forward network (:func:`class_token`).

    Args:
        layers: Further learnable layers behind the transfer. 0 takes the least memory and time; not in the paper.
        pool: ``'cls_token'`` or ``'mean'`` over the patch tokens. Default: the class token where there is one.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.

    Raises:
        MisuseError: The backbone has maps, not tokens, or no class token to take.
    """

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        layers: int = 1,
        pool: str | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        extra = boundary.feature.extra_tokens
        if extra is None:
            raise MisuseError(
                'ViTLocalHead is for transformers; for a convolutional backbone set local_head.type to DGLLocalHead or another'
            )
        if pool not in (None, 'cls_token', 'mean') or (pool == 'cls_token' and not extra):
            raise MisuseError(f"ViTLocalHead.pool={pool!r}: choose 'mean'" + (" or 'cls_token'" if extra else ''))
        if layers < 0:
            raise MisuseError(f'ViTLocalHead.layers={layers}: choose 0 or more')
        following = [*zip(boundary.following, boundary.following_features, strict=True)][:layers]
        feature = following[-1][1] if following else boundary.feature
        super().__init__(boundary, transfer, head, feature.channels, loss_weight, init_cfg=None)
        self.pool = pool or ('cls_token' if extra else 'mean')
        self.layers = ModuleList(copy.deepcopy(unit).requires_grad_(True) for unit, _ in following)
        self.norm = nn.LayerNorm(feature.channels, eps=1e-6)

    def transferred(self, x: Tensor, inputs: Tensor) -> Tensor:
        if self.pool == 'cls_token' and not self.layers and self.transfer.copies:
            return self.transfer(x, run=class_token)
        return super().transferred(x, inputs)

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        grid = self.grid_of(self.feature, inputs)
        for i, layer in enumerate(self.layers, start=1):
            is_read = self.pool == 'cls_token' and i == len(self.layers)
            y = class_token(layer, y) if is_read else layer(y, *grid)
        y = self.norm(y)
        return y[:, 0] if self.pool == 'cls_token' else y[:, self.feature.extra_tokens :].mean(1)


def class_token(layer: nn.Module, x: Tensor) -> Tensor:
    """What a transformer layer makes of the first token: its attention sees all of them, what follows only that one.

    It equals ``layer(x)[:, :1]``, to rounding, with fewer FLOPs and activations. Dropout draws fewer numbers.

    Args:
        layer: A layer of mmpretrain's ViT; any other is run as it is.
        x: (B, L, C).

    Returns:
        (B, 1, C).
    """
    if not _is_plain(layer):
        return layer(x)[:, :1]
    own, first = vars(layer).get('forward'), partial(_first_token, layer)
    return own.instead(first, x) if isinstance(own, Recomputed) else first(x)


def _is_plain(layer: nn.Module) -> bool:
    from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

    return type(layer).forward is TransformerEncoderLayer.forward


def _first_token(layer: nn.Module, x: Tensor) -> Tensor:
    x = (x + layer.attn(layer.ln1(x)))[:, :1]
    return layer.ffn(layer.ln2(x), identity=x)
