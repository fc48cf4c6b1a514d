"""Renames a backbone's tensors to the names of torchvision or timm, for plain ResNets and vision transformers.

mmdet, mmseg and mmpretrain use the same names for a plain ResNet as torchvision and timm. Variants with additional layers (a
deep stem, squeeze-and-excitation, ...) have no counterpart with the same names, and are rejected.
"""

from __future__ import annotations

import ast
import re

from torch import Tensor

from mmman.errors import CheckpointError

FORMATS = ('torchvision', 'timm')

# Keys: blocks per stage, convolutions per block, first two sizes of layer1.0.conv2.weight (channels, channels per group).
_RESNETS = {
    ((2, 2, 2, 2), 2, (64, 64)): 'resnet18',
    ((3, 4, 6, 3), 2, (64, 64)): 'resnet34',
    ((3, 4, 6, 3), 3, (64, 64)): 'resnet50',
    ((3, 4, 23, 3), 3, (64, 64)): 'resnet101',
    ((3, 8, 36, 3), 3, (64, 64)): 'resnet152',
    ((3, 4, 6, 3), 3, (128, 4)): 'resnext50_32x4d',
    ((3, 4, 23, 3), 3, (256, 8)): 'resnext101_32x8d',
    ((3, 4, 23, 3), 3, (256, 4)): 'resnext101_64x4d',
    ((3, 4, 6, 3), 3, (128, 128)): 'wide_resnet50_2',
    ((3, 4, 23, 3), 3, (128, 128)): 'wide_resnet101_2',
}
_TIMM_RESNETS = {**_RESNETS, ((3, 4, 23, 3), 3, (128, 4)): 'resnext101_32x4d'}
_RESNET_NAME = re.compile(
    r'(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))'
    r'\.(weight|bias|running_mean|running_var|num_batches_tracked)'
)

# Names in mmpretrain's, timm's and torchvision's VisionTransformer; {} is the layer's index.
_VIT_NAMES = (
    ('cls_token', 'cls_token', 'class_token'),
    ('pos_embed', 'pos_embed', 'encoder.pos_embedding'),
    ('patch_embed.projection.', 'patch_embed.proj.', 'conv_proj.'),
    ('layers.{}.ln1.', 'blocks.{}.norm1.', 'encoder.layers.encoder_layer_{}.ln_1.'),
    ('layers.{}.attn.qkv.', 'blocks.{}.attn.qkv.', 'encoder.layers.encoder_layer_{}.self_attention.in_proj_'),
    ('layers.{}.attn.proj.', 'blocks.{}.attn.proj.', 'encoder.layers.encoder_layer_{}.self_attention.out_proj.'),
    ('layers.{}.ln2.', 'blocks.{}.norm2.', 'encoder.layers.encoder_layer_{}.ln_2.'),
    ('layers.{}.ffn.layers.0.0.', 'blocks.{}.mlp.fc1.', 'encoder.layers.encoder_layer_{}.mlp.0.'),
    ('layers.{}.ffn.layers.1.', 'blocks.{}.mlp.fc2.', 'encoder.layers.encoder_layer_{}.mlp.3.'),
    ('ln1.', 'norm.', 'encoder.ln.'),
)


def rename(state: dict[str, Tensor], config: dict, library: str) -> tuple[dict[str, Tensor], str]:
    """Rename a backbone's tensors to the names used by a library.

    Args:
        state: The tensors of an OpenMMLab backbone, without a prefix.
        config: The backbone's config, empty if unknown (:func:`backbone_config`).
        library: ``'torchvision'`` or ``'timm'``.

    Returns:
        The renamed tensors, which are all tensors of the library's model except its classifier, and the name of that model.

    Raises:
        CheckpointError: The library has no such model, or this module doesn't support it.
    """
    kind = config.get('type') or ('VisionTransformer' if 'patch_embed.projection.weight' in state else 'ResNet')
    if kind in ('ResNet', 'ResNeXt'):
        return state, _resnet(state, config, library)
    if kind == 'VisionTransformer':
        return _vision_transformer(state, library)
    raise _refusal(kind, library, 'only ResNet, ResNeXt and VisionTransformer have the same layers in both libraries')


def backbone_config(text: str) -> dict:
    """Return the config of the stock backbone in the text of a training config, or ``{}``. Its ``type`` has no scope.

    The text is parsed, never executed, because a checkpoint may come from an untrusted source.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    assigned = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    model = next((_literal(node.value) for node in assigned if node.targets[0].id == 'model'), None)
    config = model.get('backbone') if isinstance(model, dict) else None
    if isinstance(config, dict) and str(config.get('type')).endswith('LocalBackbone'):
        config = config.get('backbone')
    if not isinstance(config, dict):
        return {}
    return {**config, 'type': str(config.get('type') or '').rpartition('.')[-1]}


def _literal(node: ast.expr) -> object:
    """Evaluate an expression of ``dict(...)`` calls and literals; return None for any other expression."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _resnet(state: dict[str, Tensor], config: dict, library: str) -> str:
    kind = config.get('type', 'ResNet')
    if foreign := [name for name in state if not _RESNET_NAME.fullmatch(name)]:
        raise _refusal(kind, library, f'a plain ResNet has no {foreign[0]}')
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith('weight')}
    stages = [{name.split('.')[1] for name in shapes if name.startswith(f'layer{i}.')} for i in (1, 2, 3, 4)]
    convolutions = 3 if 'layer1.0.conv3.weight' in shapes else 2
    if convolutions == 3 and config.get('style', 'pytorch') != 'pytorch':
        raise _refusal(kind, library, f'with style={config["style"]!r} its strides are on other convolutions')
    known = _TIMM_RESNETS if library == 'timm' else _RESNETS
    model = known.get((tuple(map(len, stages)), convolutions, shapes.get('layer1.0.conv2.weight', ())[:2]))
    width = 64 * 8 * (4 if convolutions == 3 else 1)
    if model is None or shapes.get('conv1.weight') != (64, 3, 7, 7) or shapes['layer4.0.downsample.0.weight'][0] != width:
        raise _refusal(kind, library, f'its depth, width and stem match none of {", ".join(known.values())}')
    return model


def _vision_transformer(state: dict[str, Tensor], library: str) -> tuple[dict[str, Tensor], str]:
    column = 1 + ('timm', 'torchvision').index(library)
    renamed, used = {}, set()
    for name, tensor in state.items():
        index = ''.join(re.findall(r'^layers\.(\d+)\.', name))
        pattern = name.replace(f'layers.{index}.', 'layers.{}.', 1) if index else name
        row = next((row for row in _VIT_NAMES if pattern == row[0] or (row[0][-1] == '.' and pattern.startswith(row[0]))), None)
        if row is None:
            raise _refusal('VisionTransformer', library, f'that model has no {name}')
        used.add(row)
        renamed[row[column].format(index) + pattern.removeprefix(row[0])] = tensor
    if missing := [row[0] for row in _VIT_NAMES if row not in used]:
        raise _refusal('VisionTransformer', library, f'this one has no {missing[0]}')
    if library == 'torchvision' and 'layers.0.attn.qkv.bias' not in state:
        raise _refusal('VisionTransformer', library, 'this one has qkv_bias=False')
    depth = len([name for name in state if name.endswith('.attn.qkv.weight')])
    return renamed, f'VisionTransformer, {depth} layers of width {state["ln1.weight"].numel()}'


def _refusal(kind: str, library: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f'--format {library}: {kind} cannot be converted to {library}: {reason}; '
        'use --format mm, and load it into its own class'
    )
