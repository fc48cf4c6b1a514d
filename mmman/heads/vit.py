"""The local head of vision transformers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.cls import ClsLocalHead
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.memory.recompute import Recomputed
from mmman.options import Range, checked
from mmman.partition.chain import run_unit
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class ViTLocalHead(ClsLocalHead):
    """Transfer, one more learnable layer, LayerNorm, class token, linear classifier (MAN++ on ViT).

    The layer is built like the backbone's unit that follows the head's input; if none follows, there is no such layer. Without
    a class token (Swin, ``with_cls_token=False``) the mean of the patch tokens is classified. If the class token is classified,
    the last layer computes only that token (:func:`forward_class_token`).

    Args:
        layers: Number of further learnable layers after the transfer. 0 needs the least memory and time; not in the paper.
        pool: ``'cls_token'`` or ``'mean'`` over the patch tokens. Default: the class token if there is one.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.

    Raises:
        ConfigError: The backbone has maps instead of tokens, or has no class token for ``pool='cls_token'``.
    """

    supports_channel_bias = True

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        layers: Annotated[int, Range(0)] = 1,
        pool: Literal['cls_token', 'mean'] | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        extra = boundary.feature.extra_tokens
        if extra is None:
            raise ConfigError(
                'ViTLocalHead requires a transformer; for a convolutional backbone set local_head.type, e.g. to DGLLocalHead'
            )
        if pool == 'cls_token' and not extra:
            raise ConfigError("model.backbone.local_head.pool='cls_token': the backbone has no class token; choose 'mean'")
        following = [*zip(boundary.following_units, boundary.following_features, strict=True)][:layers]
        feature = following[-1][1] if following else boundary.feature
        super().__init__(boundary, transfer, head, feature.channels, loss_weight, init_cfg=None)
        self.pool = pool or ('cls_token' if extra else 'mean')
        self.layers = ModuleList(copy.deepcopy(unit).requires_grad_(True) for unit, _ in following)
        self.norm = nn.LayerNorm(feature.channels, eps=1e-6)

    @property
    def unit_copies(self) -> list[nn.Module]:
        return [*super().unit_copies, self.layers]

    def apply_transfer(self, x: Tensor, inputs: Tensor) -> Tensor:
        if self.pool == 'cls_token' and not self.layers and self.transfer.copies:
            return self.transfer(x, *self.hw_shape_args(x, self.output, inputs), run_copy=forward_class_token)
        return super().apply_transfer(x, inputs)

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        features = (y, *self.hw_shape_args(y, self.feature, inputs))
        for i, layer in enumerate(self.layers, start=1):
            is_read = self.pool == 'cls_token' and i == len(self.layers)
            features = (forward_class_token(layer, *features),) if is_read else run_unit(layer, *features)
        y = self.norm(features[0])
        return y[:, 0] if self.pool == 'cls_token' else y[:, self.feature.extra_tokens :].mean(1)


def forward_class_token(layer: nn.Module, x: Tensor, *hw_shape: tuple[int, int]) -> Tensor:
    """Compute a transformer layer's output for the first token only: attention is computed for this token's query only.

    The result equals ``layer(x)[:, :1]`` up to rounding, with a few percent of its FLOPs and activations. Dropout draws fewer
    random numbers.

    Args:
        layer: A layer of mmpretrain's ViT; any other layer runs in full.
        x: (B, L, C).
        hw_shape: Height and width in patches, for layers that take them (EVA02).

    Returns:
        (B, 1, C).
    """
    if not _is_stock_layer(layer):
        return layer(x, *hw_shape)[:, :1]
    own, first = vars(layer).get('forward'), partial(_forward_first_token, layer)
    return own.run(first, x) if isinstance(own, Recomputed) else first(x)


def _is_stock_layer(layer: nn.Module) -> bool:
    from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

    return type(layer).forward is TransformerEncoderLayer.forward


def _forward_first_token(layer: nn.Module, x: Tensor) -> Tensor:
    x = x[:, :1] + _attend_first_token(layer.attn, layer.ln1(x))
    return layer.ffn(layer.ln2(x), identity=x)


def _attend_first_token(attn: nn.Module, x: Tensor) -> Tensor:
    """``attn(x)[:, :1]`` of mmpretrain's ``MultiheadAttention``, without computing keys and values of all tokens.

    With a single query q, a head's scores q·(W_k x + b_k) are (W_kᵀ q)·x plus a constant that softmax cancels. Its output Σ a
    (W_v x + b_v) is W_v (Σ a x) + b_v Σ a.

    Args:
        attn: The attention.
        x: (B, L, C).

    Returns:
        (B, 1, C).
    """
    from mmpretrain.models.utils import MultiheadAttention

    if type(attn).forward is not MultiheadAttention.forward or attn.v_shortcut or type(attn.qkv) is not nn.Linear:
        return attn(x)[:, :1]
    head_shape = (attn.num_heads, attn.head_dims)
    query_weight, key_weight, value_weight = attn.qkv.weight.chunk(3)
    query_bias, _, value_bias = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    query = F.linear(x[:, 0], query_weight, query_bias).unflatten(-1, head_shape)
    projected_query = torch.einsum('bhd,hdc->bhc', query, key_weight.unflatten(0, head_shape))
    scores = projected_query @ x.transpose(1, 2) * attn.head_dims**-0.5
    attention = F.dropout(scores.softmax(-1), attn.attn_drop, attn.training)
    output = torch.einsum('bhc,hdc->bhd', attention @ x, value_weight.unflatten(0, head_shape))
    if value_bias is not None:
        output = output + attention.sum(-1, keepdim=True) * value_bias.unflatten(0, head_shape)
    return attn.out_drop(attn.gamma1(attn.proj_drop(attn.proj(output.flatten(1)[:, None]))))
