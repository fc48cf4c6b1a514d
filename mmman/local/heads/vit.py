"""The local head of vision transformers."""

from __future__ import annotations

import copy

from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.local.heads.base import Boundary
from mmman.local.heads.cls import ClsLocalHead
from mmman.local.transfer import MomentumTransfer
from mmman.registry import MODELS


@MODELS.register_module()
class ViTLocalHead(ClsLocalHead):
    """Transfer, one more learnable layer, LayerNorm, class token, linear classifier (MAN++ on ViT).

    The layer is built like the unit that runs next in the backbone on what the head sees; where none follows there is none.
    Without a class token (Swin, ``with_cls_token=False``) the mean of the patch tokens is classified.

    Args:
        pool: ``'cls_token'`` or ``'mean'`` over the patch tokens. Default: the class token where there is one.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.

    Raises:
        MisuseError: The backbone has maps, not tokens, or no class token to take.
    """

    def __init__(
        self, boundary: Boundary, transfer: MomentumTransfer, head: dict, pool: str | None = None, loss_weight: float = 1.0
    ) -> None:
        extra = boundary.feature.extra_tokens
        if extra is None:
            raise MisuseError(
                'ViTLocalHead is for transformers; for a convolutional backbone set local_head.type to DGLLocalHead or another'
            )
        if pool not in (None, 'cls_token', 'mean') or (pool == 'cls_token' and not extra):
            raise MisuseError(f"ViTLocalHead.pool={pool!r}: choose 'mean'" + (" or 'cls_token'" if extra else ''))
        following = [*zip(boundary.following, boundary.following_features, strict=True)][:1]
        feature = following[0][1] if following else boundary.feature
        super().__init__(boundary, transfer, head, feature.channels, loss_weight, init_cfg=None)
        self.pool = pool or ('cls_token' if extra else 'mean')
        self.layers = ModuleList(copy.deepcopy(unit).requires_grad_(True) for unit, _ in following)
        self.norm = nn.LayerNorm(feature.channels, eps=1e-6)

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(y, *self.grid_of(self.feature, inputs))
        y = self.norm(y)
        return y[:, 0] if self.pool == 'cls_token' else y[:, self.feature.extra_tokens :].mean(1)
