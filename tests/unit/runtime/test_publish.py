"""What a published checkpoint holds, which weights, under whose names, and what is refused."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmman
from mmman.errors import CheckpointError
from mmman.runtime.formats import backbone_config, rename
from mmman.runtime.publish import publish
from tests.toy import toy_batches, toy_config
from tools import publish_model

CONFIG = """
import_nothing = open('ran', 'w')
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmman.LocalBackbone', num_blocks=2, backbone=dict(type='{}', depth=18, style='{}')),
    data_preprocessor=dict(std=[-1.0, float('inf')]))
"""


def saved(path, **changes):
    """A training checkpoint with every part that mmengine's runner writes, and a few tensors."""
    torch.manual_seed(0)
    names = (
        'backbone.conv1.weight',
        'backbone.local.layer1_1.transfer.delta',
        'backbone.local.layer1_1.fc.bias',
        'head.fc.bias',
    )
    content = {
        'meta': {
            'cfg': CONFIG.format('ResNet', 'pytorch'),
            'epoch': 3,
            'iter': 12,
            'seed': 0,
            'mmengine_version': '0.10.7',
            'dataset_meta': {'classes': ('a', 'b'), 'palette': np.arange(6.0).reshape(2, 3), 'label_map': None},
        },
        'state_dict': {name: torch.rand(3) for name in names},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0], [1])}},
        'optimizer': {'state': {0: {'momentum_buffer': torch.rand(1000)}}, 'param_groups': []},
        'param_schedulers': [{'last_step': 12}],
        **changes,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def test_only_weights_and_plain_meta_are_published(tmp_path):
    source = saved(tmp_path / 'epoch_3.pth')
    file, summary = publish(source, tmp_path / 'shared' / 'model.v1.pth')
    assert file.name == f'model.v1-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    published, trained = torch.load(file), torch.load(source)['state_dict']
    assert published.keys() == {'state_dict', 'meta'}
    assert [*published['state_dict']] == ['backbone.conv1.weight', 'head.fc.bias']
    assert all(torch.equal(tensor, trained[name]) for name, tensor in published['state_dict'].items())
    text = published['meta'].pop('cfg')
    assert 'open' not in text and backbone_config(text) == {'type': 'ResNet', 'depth': 18, 'style': 'pytorch'}
    assert published['meta'] == {
        'dataset_meta': {'classes': ('a', 'b'), 'palette': [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]},
        'epoch': 3,
        'iter': 12,
        'mmengine_version': '0.10.7',
        'mmman_version': mmman.__version__,
    }
    assert re.fullmatch(
        r'2 tensors, 0\.0 MB; the trained weights; names as in the model; dropped: 2 tensors of local heads', summary
    )


def test_a_published_file_needs_torch_alone(tmp_path):
    file, _ = publish(saved(tmp_path / 'a.pth'), tmp_path / 'b.pth')
    code = (
        'import sys, torch\n'
        f'print(sorted(torch.load({str(file)!r}, weights_only=True)["state_dict"]))\n'
        'assert not {"mmman", "mmengine"} & {*sys.modules}'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "['backbone.conv1.weight', 'head.fc.bias']"


def test_views_of_large_storages_are_written_small(tmp_path):
    source = saved(tmp_path / 'a.pth', state_dict={'backbone.conv1.weight': torch.zeros(10**6)[:3]})
    file, _ = publish(source, tmp_path / 'b.pth')
    assert file.stat().st_size < 10_000 < source.stat().st_size


def test_the_backbone_alone(tmp_path):
    file, summary = publish(saved(tmp_path / 'a.pth'), tmp_path / 'b.pth', backbone_only=True)
    assert [*torch.load(file)['state_dict']] == ['backbone.conv1.weight']
    assert "init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')" in summary
    assert summary.endswith('dropped: 2 tensors of local heads, 1 tensors of neck and heads')


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    source = saved(tmp_path / 'a.pth')
    file, _ = publish(source, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match=f'{file.name} exists; give another OUT, or use --force'):
        publish(source, tmp_path / 'b.pth')
    assert publish(source, tmp_path / 'b.pth', force=True)[0] == file


@pytest.mark.parametrize(
    ('changes', 'options', 'message'),
    [
        ({'state_dict': None}, {}, 'has no weights: it has no state_dict, only meta, message_hub, optimizer; copy or'),
        (
            {'state_dict': {'head.fc.bias': torch.zeros(1)}},
            {'backbone_only': True},
            r'no tensor below .backbone\..*only head.\*',
        ),
        ({}, {'ema': True}, '--ema: the checkpoint has no averaged weights; leave --ema out'),
        ({}, {'library': 'timm'}, '--format timm: ResNet cannot be converted .* depth, width and stem'),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, options, message):
    with pytest.raises(CheckpointError, match=message):
        publish(saved(tmp_path / 'a.pth', **changes), tmp_path / 'b.pth', **options)
    assert [*tmp_path.iterdir()] == [tmp_path / 'a.pth']


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint at'):
        publish(tmp_path / 'none.pth', tmp_path / 'b.pth')
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(CheckpointError, match='not a checkpoint: it does not begin like a file of torch.save'):
        publish(tmp_path / 'text.pth', tmp_path / 'b.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='holds a list, not a dict of weights'):
        publish(tmp_path / 'list.pth', tmp_path / 'b.pth')


def test_averaged_and_trained_weights_of_an_ema_hook(tmp_path):
    torch.manual_seed(0)
    runner = Runner(
        MODELS.build(toy_config()),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(
            [{**batch, 'inputs': batch['inputs'].float()} for batch in toy_batches(3)], collate_fn=lambda batch: batch[0]
        ),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 3},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
        custom_hooks=[{'type': 'mmman.EMABiasHook'}, {'type': 'EMAHook', 'momentum': 0.5}],
        default_hooks={'logger': None, 'checkpoint': {'type': 'CheckpointHook', 'interval': 3, 'by_epoch': False}},
        experiment_name=tmp_path.name,
    )
    runner.train()
    average = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module.state_dict()
    trained = runner.model.state_dict()
    for ema, theirs, words in (
        (True, average, "EMAHook's averaged weights"),
        (False, trained, 'the trained weights (it also has averaged weights: use --ema to publish them)'),
    ):
        file, summary = publish(tmp_path / 'iter_3.pth', tmp_path / 'b.pth', ema=ema)
        ours = torch.load(file)['state_dict']
        assert words in summary
        assert [*ours] == [name for name in theirs if '.local.' not in name]
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not torch.equal(average['backbone.stem.weight'], trained['backbone.stem.weight'])


def test_module_versions_are_kept(tmp_path):
    model = MODELS.build(toy_config())
    file, _ = publish(saved(tmp_path / 'a.pth', state_dict=model.state_dict()), tmp_path / 'b.pth')
    versions = torch.load(file)['state_dict']._metadata
    assert versions['backbone.layer1.0.bn'] == {'version': 2}
    assert not any('local' in name for name in versions)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    command = ['publish_model.py', str(saved(tmp_path / 'a.pth')), str(tmp_path / 'b.pth'), '--backbone-only']
    monkeypatch.setattr(sys, 'argv', command)
    publish_model.main()
    (file,) = tmp_path.glob('b-????????.pth')
    printed = capsys.readouterr().out
    assert printed.startswith(f'{file}: 1 tensors, ') and printed.count('\n') == 1
    monkeypatch.setattr(sys, 'argv', [*command, '--ema'])
    with pytest.raises(SystemExit, match='--ema: the checkpoint has no averaged weights'):
        publish_model.main()


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
