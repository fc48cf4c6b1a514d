"""Pretrained weights of a localised backbone: what arrives, what is said about it, what is refused."""

import copy
import pickle

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mmman.engine.pretrained import report_pretrained
from mmman.errors import ConfigError
from tests.toy import toy_batches, toy_config


def runner_of(work_dir, model, **options):
    return Runner(
        model,
        work_dir=str(work_dir),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(1), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 1, 'val_interval': 9},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.0}},
        custom_hooks=[{'type': 'mmman.EMABiasHook'}],
        default_hooks={'logger': None, 'checkpoint': None},
        experiment_name=f'{work_dir.name}-{len([*work_dir.iterdir()])}',
        **options,
    )


def model_of(init_cfg=None, **options):
    model = MODELS.build(toy_config(**options)).double()
    model.backbone.init_cfg = init_cfg
    return model


def pretrained(file, **options):
    return {'type': 'Pretrained', 'checkpoint': str(file), **options}


def log_of(work_dir):
    return max(work_dir.glob('*/*.log'), key=lambda path: path.stat().st_mtime).read_text()


@pytest.fixture
def raw(tmp_path):
    """The checkpoint of a locally trained model: every tensor, of the heads too, is like no initialisation."""
    model = model_of()
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 1)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, tmp_path / 'raw.pth')
    return tmp_path / 'raw.pth'


def stock(state):
    return {name: value for name, value in state.items() if '.local.' not in name and name.startswith('backbone.')}


def counted(state):
    """What is counted: not the batches that a BatchNorm saw."""
    return [name for name in state if '.local.' not in name and 'head.' not in name and 'num_batches_tracked' not in name]


def test_the_backbone_is_taken_and_the_heads_of_the_file_are_not(tmp_path, raw):
    model = model_of([{'type': 'Kaiming', 'layer': 'Conv2d'}, pretrained(raw, prefix='backbone.')])
    runner_of(tmp_path, model).train()
    loaded, state = torch.load(raw)['state_dict'], model.state_dict()
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')  # which move in the one iteration
    assert all(torch.equal(state[name], loaded[name]) for name in stock(state) if not name.endswith(statistics))
    for head in model.backbone.local.values():
        assert head.transfer.s == 1  # the file has the same cuts, names and shapes
        assert not torch.equal(head.fc[3].weight, loaded[f'backbone.local.{head.unit.replace(".", "_")}.fc.3.weight'])
        source = dict(head.source.of(model.backbone).named_parameters())
        for copied in head.transfer.copies:
            assert all(torch.equal(value, source[name]) for name, value in copied.named_parameters())


def test_what_was_taken_and_left_is_one_line(tmp_path, raw):
    model = model_of(pretrained(raw, prefix='backbone'))  # mmengine adds the dot
    runner_of(tmp_path, model).train()
    state = torch.load(raw)['state_dict']
    count, local = len(counted(state)), sum('.local.' in name for name in state)
    said = [line for line in log_of(tmp_path).splitlines() if 'backbone tensors' in line]
    assert len(said) == 1 and said[0].endswith(
        f'INFO - loaded {count} of {count} backbone tensors from {raw}; unused: {local} of backbone.local.*, 4 of head.*'
    )
    assert 'missing keys' not in log_of(tmp_path)


def test_a_file_with_more_and_fewer_tensors(tmp_path, raw):
    state = {name.removeprefix('backbone.'): value for name, value in stock(torch.load(raw)['state_dict']).items()}
    del state['stem.weight']
    state['layer3.0.conv.weight'] = torch.zeros(1)
    torch.save({**state, 'fc.weight': torch.zeros(1)}, tmp_path / 'stock.pth')
    runner_of(tmp_path, model_of({**pretrained(tmp_path / 'stock.pth'), 'type': PretrainedInit})).train()
    (said,) = [line for line in log_of(tmp_path).splitlines() if 'backbone tensors' in line]
    count = len(counted(state))
    assert said.endswith(
        f'WARNING - loaded {count - 1} of {count + 1} backbone tensors from {tmp_path / "stock.pth"}; '
        'missing, or of another shape: stem.weight, layer3.0.conv.weight; unused: 1 of fc.*'
    )


@pytest.mark.parametrize(
    ('prefix', 'net', 'message'),
    [
        ('bacbone.', {}, "RAW has no tensor below 'bacbone.'; .* of ToyNet below 'backbone.': set prefix='backbone.'"),
        (None, {}, "no tensor was loaded from RAW; .* of ToyNet below 'backbone.': set prefix='backbone.'"),
        ('head.', {}, "no tensor was loaded from RAW; .* of ToyNet below 'backbone.': set prefix='backbone.'"),
        (
            'backbone.',
            {'width': 2},
            r'no tensor was loaded from RAW; stem.weight .* shape \(2, 3, 3, 3\), in the file \(4, 3, 3, 3\): use',
        ),
    ],
)
def test_weights_that_do_not_arrive_are_refused(tmp_path, raw, prefix, net, message):
    with pytest.raises(ConfigError, match=message.replace('RAW', str(raw))) as error:
        runner_of(tmp_path, model_of(pretrained(raw, prefix=prefix), num_blocks=2, net=net)).train()
    assert '\n' not in str(error.value)


def test_a_file_of_another_architecture(tmp_path):
    torch.save({'state_dict': {'encoder.weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    with pytest.raises(ConfigError, match='; ToyNet has stem.weight, .*file encoder.weight, .*: use a checkpoint of'):
        runner_of(tmp_path, model_of(pretrained(tmp_path / 'other.pth'))).train()


def test_names_without_a_prefix(tmp_path, raw):
    state = {name.removeprefix('backbone.'): value for name, value in stock(torch.load(raw)['state_dict']).items()}
    torch.save(state, raw)
    with pytest.raises(ConfigError, match="has no tensor below 'backbone.'; .* set prefix=None in its init_cfg"):
        runner_of(tmp_path, model_of(pretrained(raw, prefix='backbone.'))).train()


def test_a_checkpoint_to_load_or_to_test_makes_pretrained_weights_moot(tmp_path, raw):
    model = model_of(pretrained(tmp_path / 'gone.pth', prefix='backbone.'))
    loop = {'dataloader': torch.utils.data.DataLoader([], collate_fn=list), 'evaluator': []}
    test = runner_of(
        tmp_path, model, load_from=str(raw), test_dataloader=loop['dataloader'], test_cfg={}, test_evaluator=loop['evaluator']
    )
    test.call_hook('before_run')  # a test run initialises nothing: the file may be gone
    model = model_of(pretrained(raw))
    runner_of(tmp_path, model, load_from=str(raw)).train()
    assert 'backbone tensors' not in log_of(tmp_path)
    assert all(head.transfer.s == 1 + torch.load(raw)['state_dict'][f'backbone.local.{name}.transfer.delta']
               for name, head in model.backbone.local.items())  # fmt: skip


def test_a_state_dict_of_the_backbone_itself_has_its_heads(raw):
    state = torch.load(raw)['state_dict']
    own = {name.removeprefix('backbone.'): value for name, value in state.items() if name.startswith('backbone.')}
    for model in (model_of(), copy.deepcopy(model_of()), pickle.loads(pickle.dumps(model_of()))):
        model.backbone.load_state_dict(own)
        assert all(torch.equal(value, own[name]) for name, value in model.backbone.state_dict().items())
        assert model.backbone.local.missing_pretrained is None


class Holder(BaseModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def test_a_backbone_that_loads_by_rules_of_its_own(tmp_path, monkeypatch):
    """mmdet's Swin takes a prefix off by itself, and converts the names and the order of the original's tensors."""
    pytest.importorskip('mmdet')
    said = []
    monkeypatch.setattr('mmman.engine.pretrained.print_log', lambda message, **options: said.append(message))
    small = {'embed_dims': 8, 'depths': (1, 1, 2, 1), 'num_heads': (1, 1, 2, 2), 'window_size': 2, 'pretrain_img_size': 64}
    swin = {'type': 'mmdet.SwinTransformer', **small}
    state = MODELS.build(swin).state_dict()
    prefixed = {f'backbone.{name}': value for name, value in state.items()}
    changes = {'stages': 'layers', 'attn.w_msa': 'attn', 'ffn.layers.0.0': 'mlp.fc1', 'ffn.layers.1': 'mlp.fc2'}
    original = {}
    for name, value in state.items():
        for ours, theirs in {**changes, 'patch_embed.projection': 'patch_embed.proj'}.items():
            name = name.replace(ours, theirs)
        original[name] = value
    for content, convert, left in (
        (prefixed, False, 'unused: nothing'),
        (original, True, 'SwinTransformer converts names, so the unused tensors are not known'),
    ):
        torch.save({'state_dict': content}, tmp_path / 'swin.pth')
        config = {**swin, 'init_cfg': ConfigDict(pretrained(tmp_path / 'swin.pth')), 'convert_weights': convert}
        model = Holder(MODELS.build({'type': 'mmman.LocalBackbone', 'backbone': config, 'num_blocks': 1}))
        model.init_weights()
        report_pretrained(model.backbone)
        assert said.pop() == f'loaded {len(state)} of {len(state)} backbone tensors from {tmp_path / "swin.pth"}; {left}'
