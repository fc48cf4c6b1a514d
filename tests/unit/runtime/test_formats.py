"""Names of tensors in torchvision and timm, and architectures that have none there."""

import pytest
import torch
from mmengine.registry import MODELS

from mmman.errors import CheckpointError
from mmman.runtime.formats import backbone_config, rename
from tests.unit.runtime.test_publish import CONFIG


def norm(name):
    return [f'{name}.{part}' for part in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]


def resnet(counts=(3, 4, 6, 3), convolutions=3, width=64):
    """The tensors of a ResNet under the names that torchvision and timm document; shapes of the weights that tell it apart."""
    names = ['conv1.weight', *norm('bn1')]
    for stage, count in enumerate(counts, start=1):
        for block in range(count):
            unit = f'layer{stage}.{block}'
            for i in range(1, convolutions + 1):
                names += [f'{unit}.conv{i}.weight', *norm(f'{unit}.bn{i}')]
            if block == 0 and (stage > 1 or convolutions == 3):
                names += [f'{unit}.downsample.0.weight', *norm(f'{unit}.downsample.1')]
    shapes = {
        'conv1.weight': (width, 3, 7, 7),
        'layer1.0.conv2.weight': (width, width, 3, 3),
        'layer4.0.downsample.0.weight': (width * 8 * (4 if convolutions == 3 else 1), 4, 1, 1),
    }
    return {name: torch.empty(shapes.get(name, (1,)), device='meta') for name in names}


def vit(depth=12, width=192):
    """The tensors of mmpretrain's VisionTransformer."""
    layer = ('ln1', 'attn.qkv', 'attn.proj', 'ln2', 'ffn.layers.0.0', 'ffn.layers.1')
    modules = ['patch_embed.projection', *(f'layers.{i}.{name}' for i in range(depth) for name in layer), 'ln1']
    names = ['cls_token', 'pos_embed', *(f'{name}.{part}' for name in modules for part in ('weight', 'bias'))]
    return {name: torch.empty(width, device='meta') for name in names}


def timm_vit(depth=12):
    """Names of timm's vit_tiny_patch16_224 without its classifier, as its source documents them."""
    layer = ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
    modules = ['patch_embed.proj', *(f'blocks.{i}.{name}' for i in range(depth) for name in layer), 'norm']
    return ['cls_token', 'pos_embed', *(f'{name}.{part}' for name in modules for part in ('weight', 'bias'))]


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize(
    ('model', 'counts', 'convolutions'),
    [
        ('resnet18', (2, 2, 2, 2), 2),
        ('resnet34', (3, 4, 6, 3), 2),
        ('resnet50', (3, 4, 6, 3), 3),
        ('resnet152', (3, 8, 36, 3), 3),
    ],
)
def test_plain_resnets_keep_their_names(library, model, counts, convolutions):
    state = resnet(counts, convolutions)
    renamed, found = rename(state, {'type': 'ResNet'}, library)
    assert found == model
    assert renamed.keys() == state.keys()


def test_vision_transformers_get_the_names_of_timm():
    state = vit()
    renamed, found = rename(state, {}, 'timm')
    assert found == 'VisionTransformer, 12 layers of width 192'
    assert [*renamed] == timm_vit()
    assert all(ours is theirs for ours, theirs in zip(renamed.values(), state.values(), strict=True))


def test_mmpretrain_names_its_tensors_so():
    pytest.importorskip('mmpretrain')
    MODELS.import_from_location()
    build = {'type': 'mmpretrain.VisionTransformer', 'arch': 'deit-tiny', 'img_size': 32}
    assert MODELS.build(build).state_dict().keys() == vit().keys()
    assert MODELS.build({'type': 'mmpretrain.ResNet', 'depth': 50}).state_dict().keys() == resnet().keys()


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize('kind', ['resnet', 'vit'])
def test_strict_loading_and_equal_features(library, kind):
    pytest.importorskip('mmpretrain')
    models = pytest.importorskip(library)
    options = {'type': 'ResNet', 'depth': 18} if kind == 'resnet' else {'type': 'VisionTransformer', 'arch': 'deit-tiny'}
    ours = MODELS.build({**options, 'type': f'mmpretrain.{options["type"]}'})
    torch.manual_seed(0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    renamed, _ = rename(ours.state_dict(), {}, library)
    if library == 'timm':
        theirs = models.create_model('resnet18' if kind == 'resnet' else 'vit_tiny_patch16_224', num_classes=0)
    elif kind == 'resnet':
        theirs = models.models.resnet18()
        theirs.fc = torch.nn.Identity()
    else:
        theirs = models.models.VisionTransformer(224, 16, 12, 3, 192, 768)
        theirs.heads = torch.nn.Identity()
    theirs.load_state_dict(renamed, strict=True)
    images = torch.rand(1, 3, 224, 224)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        features = ours(images)[0]
        torch.testing.assert_close(theirs(images), features.mean((2, 3)) if kind == 'resnet' else features)


@pytest.mark.parametrize(
    ('state', 'config', 'message'),
    [
        (resnet(), {'type': 'ResNetV1d'}, 'ResNetV1d cannot be converted .*; use --format mm'),
        (resnet(), {'type': 'SEResNet'}, 'SEResNet cannot'),
        (resnet(), {'type': 'ResNet', 'style': 'caffe'}, "style='caffe'"),
        (resnet() | {'stem.0.weight': torch.zeros(1)}, {}, 'a plain ResNet has no stem.0.weight'),
        (resnet() | {'layer1.0.conv2.conv_offset.bias': torch.zeros(1)}, {}, 'has no layer1.0.conv2.conv_offset.bias'),
        (resnet(width=16), {}, 'depth, width and stem match none of resnet18, resnet34'),
        (resnet((3, 4, 6)), {}, 'none of resnet18'),
        (resnet() | {'conv1.weight': torch.zeros(64, 3, 3, 3)}, {}, 'none of resnet18'),
        (vit() | {'dist_token': torch.zeros(1)}, {}, 'has no dist_token'),
        (vit() | {'layers.0.attn.gamma1.weight': torch.zeros(1)}, {}, 'has no layers.0.attn.gamma1.weight'),
        ({name: value for name, value in vit().items() if name != 'cls_token'}, {}, 'this one has no cls_token'),
        ({name: value for name, value in vit().items() if 'qkv.bias' not in name}, {}, 'qkv_bias=False'),
    ],
)
def test_other_architectures_are_refused_by_name(state, config, message):
    with pytest.raises(CheckpointError, match=message):
        rename(state, config, 'torchvision')


def test_a_config_text_is_read_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert backbone_config(CONFIG.format('mmpretrain.ResNet', 'caffe')) == {'type': 'ResNet', 'depth': 18, 'style': 'caffe'}
    assert backbone_config("model = dict(backbone=dict(type='mmseg.ResNetV1c'))") == {'type': 'ResNetV1c'}
    for text in ('', 'model = 3', 'model = build()', 'model = dict(backbone=None)', 'model = ('):
        assert backbone_config(text) == {}
    assert not [*tmp_path.iterdir()]
