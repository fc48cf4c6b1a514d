"""The local head of vision transformers: its layers, what it classifies, and layers of which only that is computed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmman import MomentumTransfer
from mmman.analysis import LiveBytes
from mmman.errors import ConfigError
from mmman.heads.vit import forward_class_token
from mmman.memory.recompute import recompute_
from mmman.partition import Feature
from mmman.partition.chain import UnitSequence

pytest.importorskip('mmpretrain')
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

from tests.unit.heads.classifiers import HEAD, IMAGES, boundary, local_head

TOKENS = Feature(8, 8, extra_tokens=1)


X = torch.randn(4, 17, 8)


def test_vit_head_is_layer_norm_token_linear():
    layer = nn.Linear(8, 8)
    head = local_head('ViTLocalHead', where=boundary(TOKENS, following=[(layer, TOKENS), (nn.Linear(8, 8), TOKENS)]))
    assert len(head.layers) == 1
    assert head.layers[0] is not layer
    assert torch.equal(head.embed(X, IMAGES), F.layer_norm(head.layers[0](X), (8,), eps=1e-6)[:, 0])
    assert local_head('ViTLocalHead', where=boundary(TOKENS)).embed(X, IMAGES).shape == (4, 8)


@pytest.mark.parametrize(('pool', 'tokens'), [(None, 1), ('cls_token', 1), ('mean', 1), (None, 0), ('mean', 0), (None, 2)])
def test_what_the_vit_head_classifies(pool, tokens):
    head = local_head('ViTLocalHead', where=boundary(Feature(8, 8, tokens)), pool=pool)
    normed = F.layer_norm(X, (8,), eps=1e-6)
    expected = normed[:, 0] if tokens and pool != 'mean' else normed[:, tokens:].mean(1)
    assert torch.equal(head.embed(X, IMAGES), expected)


def encoder_layer(seed, **options):
    torch.manual_seed(seed)
    layer = TransformerEncoderLayer(8, 2, 16, **options).double().train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('layers', [0, 1, 2])
def test_only_the_class_token_is_computed(layers, recompute):
    """The values and gradients of whole layers, of which the class token is taken, in fewer FLOPs."""
    source, *following = (encoder_layer(seed) for seed in range(3))
    where = boundary(TOKENS, following=[(layer, TOKENS) for layer in following])
    transfer = MomentumTransfer(source, TOKENS)
    head = MODELS.build(
        {'type': 'mmman.ViTLocalHead', 'head': HEAD, 'boundary': where, 'transfer': transfer, 'layers': layers}
    ).double()
    assert len(head.layers) == layers
    if recompute:
        for layer in (*head.layers, *transfer.copies):
            recompute_(layer)
    results, flops = [], []
    for is_whole in (False, True):
        x = X.double().requires_grad_()
        head.zero_grad()
        with LiveBytes() as counter:
            if is_whole:
                y = transfer(x)
                for layer in head.layers:
                    y = layer(y)
                feature = F.layer_norm(y, (8,), eps=1e-6)[:, 0]
            else:
                feature = head.embed(head.apply_transfer(x, IMAGES), IMAGES)
            feature.square().sum().backward()
        flops.append(counter.flops)
        own = [p.grad for p in (*transfer.bias.parameters(), *head.layers.parameters())]
        assert all(gradient.any() for gradient in own)
        results.append([feature.detach(), x.grad, transfer.delta.grad, *own])
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-11)
    assert flops[0] < (0.4 if layers == 0 else 1) * flops[1]


@pytest.mark.parametrize('options', [{'qkv_bias': False}, {'layer_scale_init_value': 0.3}, {'attn_drop_rate': 0.5}])
def test_the_class_token_of_a_layer_with_options(options):
    layer = encoder_layer(0, **options).train('attn_drop_rate' not in options)  # whose numbers are others when it trains
    torch.testing.assert_close(forward_class_token(layer, X.double()), layer(X.double())[:, :1], rtol=1e-10, atol=1e-11)


def test_dropped_answers_leave_the_bias_of_values_out():
    layer, x = encoder_layer(0, attn_drop_rate=1 - 1e-9), X.double()
    seen = forward_class_token(layer, x)
    layer.attn.qkv.bias.data[16:] += 1.0
    assert torch.equal(forward_class_token(layer, x), seen)


def test_the_class_token_of_an_attention_that_is_another():
    layer = encoder_layer(0)
    expected = layer(X.double())[:, :1]
    layer.attn.qkv = nn.Sequential(layer.attn.qkv)  # an adapter around it, say
    torch.testing.assert_close(forward_class_token(layer, X.double()), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('layers', [0, 1])
def test_layers_that_take_the_grid(layers):
    """EVA02's: they run in full, and the class token is taken."""
    from mmpretrain.models.backbones.vit_eva02 import EVA02EndcoderLayer, RotaryEmbeddingFast

    rope = RotaryEmbeddingFast(embed_dims=4, patch_resolution=(4, 4))
    source, following = (EVA02EndcoderLayer(8, 2, 16, rope=rope) for _ in range(2))
    where = replace(boundary(TOKENS, following=[(following, TOKENS)]), needs_hw_shape=True)
    transfer = MomentumTransfer(source, TOKENS)
    head = MODELS.build({'type': 'mmman.ViTLocalHead', 'head': HEAD, 'boundary': where, 'transfer': transfer, 'layers': layers})
    y = source(X, (4, 4)) * 2
    if layers:
        y = following(y, (4, 4))
    assert torch.equal(head.embed(head.apply_transfer(X, IMAGES), IMAGES), F.layer_norm(y[:, 0], (8,), eps=1e-6))


def test_layers_behind_one_that_changes_the_grid_get_the_new_one():
    """Swin's patch merging is part of the first unit of a stage."""

    class Merging(nn.Module):
        def forward(self, x, grid):
            return x[:, ::4], (grid[0] // 2, grid[1] // 2)

    class Block(nn.Module):
        def forward(self, x, grid):
            assert grid[0] * grid[1] == x.shape[1] == 4
            return x + 1

    where = boundary(
        Feature(8, 8, 0), following=[(UnitSequence([Merging(), Block()]), Feature(8, 16, 0)), (Block(), Feature(8, 16, 0))]
    )
    head = local_head('ViTLocalHead', where=replace(where, needs_hw_shape=True), layers=2)
    expected = F.layer_norm(X[:, 1::4] + 2, (8,), eps=1e-6).mean(1)
    torch.testing.assert_close(head.embed(X[:, 1:], IMAGES), expected)


def test_vit_head_options_are_checked():
    with pytest.raises(ConfigError, match='layers=-1: expected an integer >= 0'):
        local_head('ViTLocalHead', where=boundary(TOKENS), layers=-1)
    with pytest.raises(ConfigError, match='requires a transformer; .*DGLLocalHead'):
        local_head('ViTLocalHead')
    with pytest.raises(ConfigError, match="choose 'mean'$"):
        local_head('ViTLocalHead', where=boundary(Feature(8, 8, 0)), pool='cls_token')
