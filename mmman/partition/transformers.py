"""The chains of backbones whose features are tokens (B, L, C), and of those that change between tokens and maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from mmman.partition.calls import Call, call, call_on_map, call_on_tokens, call_on_view, call_with_sides
from mmman.partition.chain import Chain, Unit
from mmman.partition.layouts import children, isotropic, output_norms, own_tensors, pyramid, stem


def vision_transformer(backbone: nn.Module) -> Chain:
    """Patch, class and position embedding, then the layers. The final norm counts as part of the model's head."""
    tensors = own_tensors(backbone, 'pos_embed', 'cls_token', 'dist_token')
    is_distilled = 'dist_token' in tensors  # a distilled ViT's forward has no pre_norm
    embedding = ('patch_embed', 'drop_after_pos') if is_distilled else ('patch_embed', 'drop_after_pos', 'pre_norm')
    return _pretrain_vit(backbone, embedding, tensors)


def eva02(backbone: nn.Module) -> Chain:
    """A ViT whose layers also take the grid, for the rotary position embedding."""
    tensors = own_tensors(backbone, 'pos_embed', 'cls_token')
    return _pretrain_vit(backbone, ('patch_embed', 'drop_after_pos', 'pre_norm'), tensors, needs_hw_shape=True)


def deit3(backbone: nn.Module) -> Chain:
    """A ViT that appends the class token behind the position embedding, in front of the first layer."""
    tensors = own_tensors(backbone, 'pos_embed', 'cls_token')
    return _pretrain_vit(backbone, ('patch_embed', 'drop_after_pos'), tensors, joins_first_layer='cls_token' in tensors)


def t2t_vit(backbone: nn.Module) -> Chain:
    """Tokens of overlapping patches, class and fixed position embedding, then the layers."""
    return isotropic(
        backbone,
        ('tokens_to_token', 'drop_after_pos'),
        'encoder',
        own_tensors(backbone, 'pos_embed', 'cls_token'),
        extra_tokens=backbone.num_extra_tokens,
        input_size=tuple(side * 16 for side in backbone.patch_resolution),
    )


def mlp_mixer(backbone: nn.Module) -> Chain:
    """Patch embedding, one unit with the first of the mixer layers. It takes images of one size."""
    size = tuple(backbone.img_size)
    return isotropic(backbone, ('patch_embed',), 'layers', joins_first_layer=True, input_size=size)


def seg_vision_transformer(backbone: nn.Module) -> Chain:
    """mmseg's ViT. ``out_origin`` makes the embedding the first output.

    Without ``with_cls_token`` it drops the class token in front of the layers. Unless ``pre_norm`` follows, the embedding is
    then one unit with the first layer.
    """
    norm = (backbone.pre_ln_name,) if backbone.pre_norm else ()
    chain = isotropic(
        backbone,
        ('patch_embed', 'drop_after_pos', *norm),
        'layers',
        own_tensors(backbone, 'pos_embed', 'cls_token'),
        joins_first_layer=not (backbone.with_cls_token or backbone.pre_norm),
        extra_tokens=int(backbone.with_cls_token),
        input_size=(4 * backbone.patch_size,) * 2,
    )
    return replace(chain, out_units=(0, *chain.out_units)) if backbone.out_origin else chain


def beit(backbone: nn.Module) -> Chain:
    """mmseg's BEiT and MAE. The embedding is one unit with the first layer. They take images of one size."""
    tensors = own_tensors(backbone, 'cls_token', 'pos_embed')
    size = tuple(backbone.img_size)
    return isotropic(backbone, ('patch_embed',), 'layers', tensors, joins_first_layer=True, extra_tokens=1, input_size=size)


def swin(backbone: nn.Module) -> Chain:
    """Patch embedding, then window-attention blocks; a patch merging is one unit with the block that follows it."""
    first = stem('patch_embed', 'drop_after_pos', tensors=own_tensors(backbone, 'absolute_pos_embed'))
    return _windowed(backbone, [first], lambda i: f'stages.{i - 1}.downsample')


def swin_v2(backbone: nn.Module) -> Chain:
    """Swin with the patch merging in front of a stage's blocks, in the same stage."""
    first = stem('patch_embed', 'drop_after_pos', tensors=own_tensors(backbone, 'absolute_pos_embed'))
    return _windowed(backbone, [first], lambda i: f'stages.{i}.downsample')


def davit(backbone: nn.Module) -> Chain:
    """The layout of Swin. The patch embedding is one unit with the first block."""
    return _windowed(backbone, [], lambda i: f'stages.{i - 1}.downsample' if i else 'patch_embed')


def mix_transformer(backbone: nn.Module) -> Chain:
    """MixVisionTransformer, the backbone of SegFormer."""
    return _pyramid_transformer(backbone, call_on_view)


def pyramid_transformer(backbone: nn.Module) -> Chain:
    """PVT and PVTv2."""
    return _pyramid_transformer(backbone, call_on_map)


def twins(backbone: nn.Module) -> Chain:
    """mmpretrain's PCPVT and SVT: the norm of a stage may be an identity."""
    return _twins(backbone, 'stages', [f'norm_after_stage{i}' for i in range(len(backbone.stages))])


def seg_twins(backbone: nn.Module) -> Chain:
    """mmseg's PCPVT and SVT."""
    return _twins(backbone, 'layers', children(backbone, 'norm_list') if backbone.norm_after_stage else [])


def mscan(backbone: nn.Module) -> Chain:
    """SegNeXt's backbone: convolutional blocks between which tokens are handed on. Every stage makes an output."""
    count = backbone.num_stages
    return _numbered(backbone, count, 'block', call_with_sides, range(count))


def van(backbone: nn.Module) -> Chain:
    """The Visual Attention Network: blocks on maps; the norm behind a stage makes tokens of them."""
    return _numbered(backbone, backbone.num_stages, 'blocks', call_on_map, backbone.out_indices)


def _pretrain_vit(backbone: nn.Module, embedding: tuple[str, ...], tensors: tuple[str, ...], **options: bool) -> Chain:
    """A ViT of mmpretrain. With ``out_type='avg_featmap'`` every output passes ``ln2``."""
    chain = isotropic(
        backbone,
        embedding,
        'layers',
        tensors,
        extra_tokens=backbone.num_extra_tokens,
        input_size=tuple(backbone.patch_embed.init_input_size),
        **options,
    )
    if backbone.out_type != 'avg_featmap':
        return chain
    return replace(chain, norms=dict.fromkeys(range(len(chain.out_units)), 'ln2'))


def _windowed(backbone: nn.Module, units: list[Unit], downsampling: Callable[[int], str]) -> Chain:
    """Stages of blocks that take the grid. ``downsampling`` names the module in front of stage i, part of its first unit."""
    last, out_units = [], []
    after = getattr(backbone, 'out_after_downsample', False)
    for i, stage in enumerate(backbone.stages):
        merging = (downsampling(i),) if i or not units else ()
        units.append(Unit.sequence((*merging, f'stages.{i}.blocks.0'), i))
        units += [Unit.single(f'stages.{i}.blocks.{j}', i) for j in range(1, len(stage.blocks))]
        last.append(len(units) - 1)
    for i in sorted(backbone.out_indices):
        # an output after the patch merging comes from inside the next stage's first unit
        out_units.append(last[i] + 1 if after and i + 1 < len(last) else last[i])
    size = getattr(backbone.patch_embed, 'init_input_size', None) or (224, 224)
    return Chain(tuple(units), tuple(out_units), output_norms(backbone), needs_hw_shape=True, input_size=tuple(size))


def _pyramid_transformer(backbone: nn.Module, call_embedding: Call) -> Chain:
    """``layers`` lists the embedding, blocks and norm of every stage.

    PVT's position embedding, the first of a stage's blocks, is part of the embedding.
    """
    stages = []
    for i, count in enumerate(backbone.num_layers):
        embed, layers, norm = children(backbone, f'layers.{i}')
        paths = children(backbone, layers)
        position, blocks = paths[:-count], paths[-count:]
        embedding = {embed: call_embedding, **dict.fromkeys(position, call)}
        stages.append((embedding, [{path: call} for path in blocks], {norm: call_on_tokens}))
    return pyramid(stages, backbone.out_indices, attends_everywhere=True)


def _twins(backbone: nn.Module, layers: str, norms: list[str]) -> Chain:
    """Twins: a position encoding follows the first block of every stage, and is part of its unit."""
    stages = []
    for i, path in enumerate(children(backbone, layers)):
        blocks = [{block: call} for block in children(backbone, path)]
        blocks[0][f'position_encodings.{i}'] = call
        embedding = {f'patch_embeds.{i}': call_on_map, f'position_encoding_drops.{i}': call_on_tokens}
        stages.append((embedding, blocks, dict.fromkeys(norms[i : i + 1], call_on_tokens)))
    return pyramid(stages, backbone.out_indices, attends_everywhere=True)


def _numbered(backbone: nn.Module, count: int, blocks: str, block_call: Call, out_indices: Iterable[int]) -> Chain:
    """Stages whose parts are attributes of the backbone, numbered from 1."""
    stages = []
    for i in range(1, count + 1):
        own = [{path: block_call} for path in children(backbone, f'{blocks}{i}')]
        stages.append(({f'patch_embed{i}': call_on_map}, own, {f'norm{i}': call_on_tokens}))
    return pyramid(stages, out_indices)
