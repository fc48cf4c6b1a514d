"""Options of ``localize_``; and a localised model is copied, pickled, converted, checkpointed and compiled as a stock one."""

import copy
import io
import pickle

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.model.utils import convert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

from mmman import delocalize_, localize_
from mmman.errors import ConfigError, LocalLearningError, PartitionError
from tests.toy import ToyLocalHead, ToyNet, toy_batches, toy_config
from tests.unit.local.test_session import gradients, step, sync, toy, wrapper


def trained_alike(model, other):
    """Both make the same three steps, with momentum, and end with the same weights."""
    for m in (model, other):
        optim_wrapper = wrapper(m)
        for batch in toy_batches(3):
            step(m, optim_wrapper, batch)
            for head in m.backbone.local.values():
                head.transfer.ema_update_(head.source.of(m.backbone), 0.9)
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


LINEAR = {'independent_head': {'type': 'mmman.LinearLocalHead', 'head': {'type': 'mmman.ToyLinearHead', 'num_classes': 5}}}


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['deepcopy', 'pickle'])
def test_a_clone_is_independent_and_trains_alike(clone):
    model = toy()
    step(model)
    other = clone(model)
    own = {id(module) for module in other.modules()}
    for module in other.modules():
        for hook in module._forward_hooks.values():
            assert id(hook.__self__) in own
    weights = {name: p.clone() for name, p in model.named_parameters()}
    step(other)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    other.load_state_dict(model.state_dict())
    assert trained_alike(model, other)


@pytest.mark.parametrize('options', [{}, {'transfer': {'source_unit': 'next_stage'}}, {'window': 2, **LINEAR}], ids=str)
def test_the_whole_model_saves_and_loads(options):
    model = toy(**options)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert trained_alike(model, torch.load(buffer, weights_only=False))


@pytest.mark.parametrize('source_unit', ['next_stage', ['layer2.0', 'layer3.0', 'layer3.1']], ids=str)
def test_copies_of_a_later_unit_follow_it(source_unit):
    model = toy(num_blocks=6, transfer={'source_unit': source_unit})
    names = [head.source.name for head in model.backbone.local.values()]
    assert names == ['layer2.0', 'layer2.0', 'layer2.0', 'layer3.0', 'layer3.0']
    source = model.backbone.layer3[0]
    source.conv.weight.data += 1
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    assert [torch.equal(head.transfer.momentum.conv.weight, source.conv.weight) for head in model.backbone.local.values()] == [
        *[False] * 3,
        *[True] * 2,
    ]


def test_state_dict_round_trip_names_the_cuts():
    model, other = toy(num_blocks=3, partition='stage'), toy(num_blocks=3, partition='stage')
    step(model)
    state = model.state_dict()
    assert {key.split('.')[2] for key in state if key.startswith('backbone.local.')} == {'layer1_1', 'layer2_1'}
    other.load_state_dict(state)
    assert trained_alike(model, other)


def test_ema_hook_of_mmengine_averages_the_model(tmp_path):
    from mmengine.runner import Runner

    torch.manual_seed(0)
    model = toy()
    runner = Runner(
        model,
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(3), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'EpochBasedTrainLoop', 'max_epochs': 2, 'val_interval': 9},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
        custom_hooks=[{'type': 'EMAHook', 'momentum': 0.5}, {'type': 'mmman.EMABiasHook'}],
        experiment_name=tmp_path.name,
    )
    runner.train()
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert saved['ema_state_dict'].keys() >= {f'module.{key}' for key, _ in model.named_parameters()}
    assert any(
        not torch.equal(saved['ema_state_dict'][f'module.{key}'], saved['state_dict'][key])
        for key, _ in model.named_parameters()
    )


def test_sync_batchnorm_conversion_and_back():
    model, plain = toy(), toy()
    # the reverse conversion replaces every normalisation layer, in units, copies and heads
    converted = revert_sync_batchnorm(convert_sync_batchnorm(model))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert converted.state_dict().keys() == plain.state_dict().keys()
    assert trained_alike(converted, plain)


def test_channels_last():
    plain, model = gradients(toy()), toy().to(memory_format=torch.channels_last)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-10, atol=1e-12)


def test_compiled_units():
    plain, model = gradients(toy()), toy()
    for unit in ('layer1.0', 'layer1.1', 'layer3.0'):
        model.backbone.get_submodule(unit).compile(backend='eager')
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-10, atol=1e-12)


def test_weights_change_between_localising_and_training():
    model = toy()
    for parameter in model.backbone.layer2.parameters():
        parameter.data += 1
    sync(model)
    for head in model.backbone.local.values():
        source = head.source.of(model.backbone).state_dict()
        assert all(torch.equal(value, source[name]) for name, value in head.transfer.momentum.state_dict().items())


def test_checkpointed_units_of_a_stock_backbone():
    pytest.importorskip('mmdet')
    got, state = [], None
    for with_cp in (False, True):
        net = {'type': 'mmdet.ResNet', 'depth': 18, 'norm_eval': False, 'out_indices': (2, 3), 'with_cp': with_cp}
        config = toy_config(num_blocks=3)
        config['backbone']['backbone'] = net
        model = MODELS.build({**config, 'channels': (256, 512)}).double()
        state = state or model.state_dict()
        model.load_state_dict(state)
        sync(model)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # stock ResNets start residual branches at zero
        step(model, wrapper(model, accumulative_counts=10), toy_batches(1, pixels=64)[0])
        got.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in got[0].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-10, atol=1e-14)


class Failing(ToyLocalHead):
    def __init__(self, boundary, *args, **kwargs):
        super().__init__(boundary, *args, **kwargs)
        if boundary.block == 2:
            raise RuntimeError('the second head')


@pytest.mark.parametrize('when', ['a head is built', 'hooks are registered'])
def test_an_error_leaves_the_backbone_as_it_was(when, monkeypatch):
    backbone, stock = ToyNet(), ToyNet()
    stock.load_state_dict(backbone.state_dict())
    head = Failing if when == 'a head is built' else ToyLocalHead
    if when == 'hooks are registered':
        monkeypatch.setattr(backbone, 'register_forward_hook', fail)
    with pytest.raises(RuntimeError, match='the second head'):
        localize_(backbone, 4, {'type': head}, partition='uniform', recompute=True)
    monkeypatch.undo()
    assert backbone.state_dict().keys() == stock.state_dict().keys()
    for module in backbone.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))
    x = torch.rand(2, 3, 16, 16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(backbone(x), stock(x), strict=True))
    localize_(backbone, 4, {'type': ToyLocalHead}, partition='uniform', recompute=True)
    assert len(backbone.local) == 3


def fail(*_):
    raise RuntimeError('the second head')


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'num_blocks': 8}, PartitionError, '7 trainable units'),
        ({'partition': ['layer7.0']}, PartitionError, "after 'layer7.0'"),
        ({'local_head': None}, ConfigError, 'set local_head'),
        ({'local_head': {'type': 'mmman.ToyNet'}}, LocalLearningError, 'is not a subclass of mmman.LocalHead'),
        (
            {'transfer': {'source_unit': ['layer3.0']}},
            ConfigError,
            'layer3.0 takes 8 channels at stride 2, but the block that ends with stem returns 4 channels at stride 1',
        ),
        ({'window': 5, **LINEAR}, ConfigError, 'window=5, but the backbone has 4 blocks: choose from 1 to that'),
        ({'window': 0}, ConfigError, 'window=0'),
        ({'window': 2}, ConfigError, 'window=2 requires independent_head, because local_head has no option head'),
        (LINEAR, ConfigError, 'independent_head has an effect in windows of several blocks only: set window'),
        (
            {'window': 2, 'independent_head': {'type': 'mmman.ToyNet'}},
            ConfigError,
            'independent_head.type=.* is not a subclass',
        ),
        ({'loss_weight': [1.0, 2.0]}, ConfigError, 'loss_weight has 2 values for 3 local heads: give one'),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises((error, TypeError), match=message):
        toy(**options)


def test_localise_once():
    model = toy()
    with pytest.raises(ConfigError, match='can be localised only once'):
        localize_(model.backbone, 2, {'type': 'mmman.ToyLocalHead'})
    delocalize_(model.backbone)
    with pytest.raises(ConfigError, match='is not localised'):
        delocalize_(model.backbone)
