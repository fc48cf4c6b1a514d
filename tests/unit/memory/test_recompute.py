"""Units that are computed again in the backward pass: the same bits, fewer bytes, and no trace left."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.model.utils import convert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import CheckpointError

from mmman import LocalHead, delocalize_, localize_
from mmman.analysis import LiveBytes
from mmman.errors import ConfigError, PartitionError
from mmman.memory.output_relu import DeferrableReLU
from mmman.memory.recompute import Recomputed, recompute_
from tests.toy import CLASSES, classify, toy_batches, toy_config
from tests.unit.local.test_localize import trained_alike
from tests.unit.local.test_session import step, sync, toy, wrapper

VIT = {'embed_dims': 16, 'num_layers': 4, 'num_heads': 2, 'feedforward_channels': 24}
SWIN = {'embed_dims': 8, 'depths': [1, 2, 1], 'num_heads': [1, 2, 2]}
CONVNEXT = {'depths': [1, 1, 2, 1], 'channels': [8] * 4}
SWIN_OPTIONS = {'out_indices': (2,), 'window_size': 4, 'pad_small_map': True, 'drop_path_rate': 0.3}
FAMILIES = {
    'toy': ({'type': 'mmman.ToyNet', 'out_indices': (2,)}, 16),
    'cifar': ({'type': 'mmman.CIFARResNet', 'depth': 14, 'out_indices': (2,)}, 64),
    'resnet': ({'type': 'mmpretrain.ResNet', 'depth': 18, 'stem_channels': 8, 'base_channels': 8, 'drop_path_rate': 0.2}, 64),
    'mobilenet': ({'type': 'mmpretrain.MobileNetV2', 'widen_factor': 0.25}, 1280),
    'vgg': ({'type': 'mmpretrain.VGG', 'depth': 11, 'norm_cfg': {'type': 'BN'}, 'out_indices': (4,)}, 512),
    'convnext': ({'type': 'mmpretrain.ConvNeXt', 'arch': CONVNEXT, 'gap_before_final_norm': False, 'drop_path_rate': 0.3}, 8),
    'vit': ({'type': 'mmpretrain.VisionTransformer', 'arch': VIT, 'img_size': 32, 'patch_size': 8, 'out_type': 'featmap'}, 16),
    'frozen': ({'type': 'mmdet.ResNet', 'depth': 18, 'base_channels': 8, 'out_indices': (3,), 'frozen_stages': 1}, 64),
    'swin': ({'type': 'mmpretrain.SwinTransformer', 'arch': SWIN, 'img_size': 32, **SWIN_OPTIONS}, 32),
}
FAMILIES['vit'][0].update(drop_rate=0.1, drop_path_rate=0.3)


@MODELS.register_module(force=True)
class PooledHead(LocalHead):
    """A local head for maps and tokens, with a BatchNorm."""

    def __init__(self, boundary, transfer, loss_weight=1.0):
        super().__init__(boundary, transfer, loss_weight)
        self.fc = nn.Sequential(nn.Linear(boundary.channels, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def loss(self, y, inputs, data_samples):
        return classify(self.fc(self.feature.pool(y)), data_samples)


WAYS = {'full': {'recompute': True}, 'selective': {'selective_recompute': True}}


def build(family, num_blocks=3, **recompute):
    net, channels = FAMILIES[family]
    pytest.importorskip(net['type'].split('.')[0])
    backbone = {'type': 'mmman.LocalBackbone', 'backbone': net, 'num_blocks': num_blocks, 'partition': 'uniform'}
    backbone |= {'local_head': {'type': 'PooledHead'}, **recompute}
    torch.manual_seed(0)
    model = MODELS.build({'type': 'mmman.ToyClassifier', 'backbone': backbone, 'channels': (channels,)})
    sync(model)
    return model.train()


def train(model, steps=3, **options):
    """The state after every step, with the momentum copies moving, and what ran how often."""
    optim_wrapper = wrapper(model, lr=0.05, **options)
    torch.manual_seed(1)
    states = []
    for batch in toy_batches(steps, pixels=32, dtype=torch.float32):
        step(model, optim_wrapper, batch)
        for head in model.backbone.local.values():
            head.transfer.ema_update_(head.source.of(model.backbone), 0.9)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    states.append({'random': torch.get_rng_state()})
    return states


def assert_same(states, others):
    for index, (state, other) in enumerate(zip(states, others, strict=True)):
        different = [name for name in state if not torch.equal(state[name], other[name])]
        assert state.keys() == other.keys() and not different, (index, different)


def recomputed(model):
    return [name for name, module in model.named_modules() if 'forward' in vars(module)]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('family', FAMILIES)
def test_three_steps_in_lock_step(family, way):
    plain, again = build(family), build(family, **WAYS[way])
    assert recomputed(again) and not recomputed(plain)
    assert_same(train(plain), train(again))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('family', ['cifar', 'vit', 'swin'])
def test_every_unit_is_recomputed_and_its_hooks_fire_once(family, way):
    model = build(family, **WAYS[way])
    count = Counter()
    units = [unit for block in model.backbone.local.plan.blocks for unit in block if unit.name != 'stem']
    modules = {path: model.backbone.get_submodule(path) for unit in units for path in unit.modules}
    for head in model.backbone.local.values():
        modules |= {f'{head.block}.{i}': copied for i, copied in enumerate(head.transfer.copies)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: count.update([name]))
        inner = next(layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.LayerNorm)))
        inner.register_forward_pre_hook(lambda *_, name=name: count.update([f'inside {name}']))
    train(model, steps=1)
    assert count == Counter({name: 1 for name in modules}) + Counter({f'inside {name}': 2 for name in modules})


@pytest.mark.parametrize(('family', 'head', 'beyond'), [('vit', 'ViTLocalHead', 'layers'), ('cifar', 'AugLocalHead', 'units')])
def test_further_copies_of_a_local_head_are_recomputed(family, head, beyond):
    pytest.importorskip('mmpretrain')
    local_head = {'type': f'mmman.{head}', 'head': {'type': 'mmpretrain.LinearClsHead', 'num_classes': 2, 'in_channels': 16}}
    backbone = {'type': 'mmman.LocalBackbone', 'backbone': FAMILIES[family][0], 'num_blocks': 3, 'recompute': True}
    backbone = MODELS.build({**backbone, 'partition': 'uniform', 'local_head': local_head})
    for head in backbone.local.values():
        copies = [*head.transfer.copies, *getattr(head, beyond)]
        assert len(copies) > 2
        for copied in copies:
            assert isinstance(copied.forward, Recomputed) and copied.forward.module is copied


def test_end_to_end_training_needs_no_session():
    grads = []
    for way in ({}, *WAYS.values()):
        model = build('cifar', num_blocks=1, **way)
        model(**toy_batches(1, pixels=32, dtype=torch.float32)[0], mode='loss')['loss_ce'].backward()
        grads.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    assert_same(grads[:1] * 2, grads[1:])


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('family', ['resnet', 'vit'])
def test_under_autocast(family, way):
    assert_same(train(build(family), dtype='bfloat16'), train(build(family, **WAYS[way]), dtype='bfloat16'))


def test_a_graph_can_be_back_propagated_twice():
    model = build('cifar', num_blocks=1, recompute=True)
    loss = model(**toy_batches(1, pixels=32, dtype=torch.float32)[0], mode='loss')['loss_ce']
    parameters = [*model.parameters()]
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(buffer == 1 for name, buffer in model.named_buffers() if name.endswith('num_batches_tracked'))


def end_to_end(recompute, units=6):
    """One channel count and one size throughout, so that every activation has the same bytes."""
    config = toy_config(num_blocks=1, net={'units': (units,), 'out_indices': (0,)}, recompute=recompute)
    torch.manual_seed(0)
    return MODELS.build({**config, 'channels': (4,)}).double()


def test_only_the_inputs_of_units_stay_alive():
    units, batch = 6, toy_batches(1)[0]
    activation, statistics = 4 * 4 * 16 * 16 * 8, 2 * 4 * 8
    alive, peaks = [], []
    for recompute in (False, True):
        model = end_to_end(recompute, units)
        with LiveBytes(model, batch) as live:
            loss = model(**batch, mode='loss')['loss_ce']
            alive.append(live.current)
            loss.backward()
            peaks.append(live.peak)
    # a unit keeps its convolution's output, and mean and deviation of its BatchNorm; the last one its own output for the ReLU
    assert alive[0] - alive[1] == units * (activation + statistics) + activation
    # in the backward pass one unit is alive in full
    assert (units - 1) * activation <= peaks[0] - peaks[1] <= units * (activation + statistics)


def test_copies_are_recomputed_one_by_one():
    x = torch.randn(4, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    activation, statistics = 4 * 8 * 8 * 8 * 8, 2 * 8 * 8  # of layer2.0
    alive, peaks = [], []
    for recompute in ([], ['layer1.0', 'layer1.1'], ['layer2.0']):
        transfer = toy(partition='stage', num_blocks=3, recompute=recompute).backbone.local['layer1_1'].transfer.train()
        for parameter in transfer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x.grad = torch.zeros_like(x)
        with LiveBytes(transfer, x) as live:
            y = transfer(x)
            alive.append(live.current)
            live.peak = 0
            y.sum().backward()
            peaks.append(live.peak)
    assert alive[0] == alive[1] and peaks[0] == peaks[1]
    # of each copy the convolution's output and the statistics; its own output is kept for the scale's gradient
    assert alive[0] - alive[2] == 2 * (activation + statistics)
    assert activation <= peaks[0] - peaks[2] <= 2 * (activation + statistics)


def test_names():
    units = ['layer1.0', 'layer1.1', 'layer2.0', 'layer2.1', 'layer3.0', 'layer3.1']
    assert recomputed(toy(num_blocks=1)) == recomputed(toy(num_blocks=1, recompute=[])) == []
    assert recomputed(toy(num_blocks=1, recompute=True).backbone) == units
    assert recomputed(toy(num_blocks=1, recompute=['layer3.1', 'layer1.0']).backbone) == ['layer1.0', 'layer3.1']
    assert recomputed(toy(num_blocks=1, recompute=['layer2', 'layer1.0', 'layer2.0']).backbone) == ['layer1.0', *units[2:4]]
    model = toy(num_blocks=3, partition='stage', recompute=['layer1.1', 'layer2.0'])
    copies = [f'local.layer1_1.transfer.{copied}' for copied in ('momentum', 'bias')]
    assert recomputed(model.backbone) == ['layer1.1', 'layer2.0', *copies]
    assert model.state_dict().keys() == toy(num_blocks=3, partition='stage').state_dict().keys()


@pytest.mark.parametrize(
    ('recompute', 'error', 'message'),
    [
        (['layer1.0', 'layer9.0'], PartitionError, r"\['layer9.0'\].* stem, layer1.0, layer1.1, .*layer3.1$"),
        (['layer1', 'layer'], PartitionError, r"\['layer'\]"),
        (['stem'], ConfigError, 'the stem of ToyNet is not one convolution without bias, BatchNorm'),
        ('layer1.0', ConfigError, r"recompute='layer1.0': expected True, False or a list of strings"),
        ({'selective_recompute': 'layer1'}, ConfigError, r"selective_recompute='layer1': expected True, False or a list"),
        ({'selective_recompute': None}, ConfigError, r'selective_recompute=None: expected True, False or a list of strings'),
        ({'selective_recompute': ['a']}, PartitionError, r"selective_recompute names \['a'\], which are no units"),
        ({'selective_recompute': ['stem']}, ConfigError, 'the stem can only be recomputed as a whole: put it into recom'),
        ({'recompute': ['layer1', 'layer2'], 'selective_recompute': ['layer2.1']}, ConfigError, 'layer2.1: in recompute and'),
    ],
    ids=str,
)
def test_units_that_cannot_be_named(recompute, error, message):
    model = toy(num_blocks=1)
    delocalize_(model.backbone)
    with pytest.raises(error, match=message):
        localize_(model.backbone, 1, **(recompute if isinstance(recompute, dict) else {'recompute': recompute}))
    assert not hasattr(model.backbone, 'local') and not recomputed(model)


def test_checkpointed_twice_is_refused():
    pytest.importorskip('mmdet')
    from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing

    net = MODELS.build({'type': 'mmdet.ResNet', 'depth': 18, 'with_cp': True})
    with pytest.raises(ConfigError, match='layer1.0 already uses with_cp=True: set with_cp=False'):
        localize_(net, 1, recompute=True)
    model = toy(num_blocks=1)
    delocalize_(model.backbone)
    turn_on_activation_checkpointing(model.backbone, 'layer1.1')
    with pytest.raises(ConfigError, match=r'forward of unit layer1.1 has been replaced \(activation_checkpointing\?\)'):
        localize_(model.backbone, 1, recompute=True)
    localize_(model.backbone, 1, recompute=['layer1.0'])


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['deepcopy', 'pickle'])
def test_a_clone_recomputes_itself(clone):
    model = toy(recompute=True)
    step(model)
    other = clone(model)
    own = {id(module) for module in other.modules()}
    wrapped = [module.forward for module in other.modules() if 'forward' in vars(module)]
    assert len(wrapped) == len(recomputed(model)) > 0
    assert all(isinstance(forward, Recomputed) and id(forward.module) in own for forward in wrapped)
    assert trained_alike(model, other)


def test_sync_batchnorm_conversion_and_back():
    converted = convert_sync_batchnorm(toy(recompute=True))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert trained_alike(converted, toy())  # in one process it is a BatchNorm
    converted = revert_sync_batchnorm(convert_sync_batchnorm(toy(recompute=True)))
    assert recomputed(converted) and trained_alike(converted, toy())


@pytest.mark.parametrize('way', WAYS)
def test_compiled_layers_of_a_unit(way):
    plain, model = toy(), toy(**WAYS[way])
    for unit in ('layer1.0', 'layer3.0'):
        model.backbone.get_submodule(f'{unit}.bn').compile(backend='eager')
    assert trained_alike(model, plain)


def test_a_compiled_unit_is_refused():
    model = toy(num_blocks=1, recompute=True)
    model.backbone.layer1[1].compile(backend='eager')
    batch = toy_batches(1)[0]
    with pytest.raises(ConfigError, match='a compiled ToyUnit cannot be recomputed: .*leave it out of recompute'):
        model(**batch, mode='loss')
    with torch.no_grad():
        compiled = torch.compile(model.backbone.eval(), backend='eager', fullgraph=True)
        assert all(map(torch.equal, compiled(batch['inputs']), model.backbone(batch['inputs'])))


def test_evaluation_is_the_plain_forward():
    plain, model = toy(num_blocks=1), toy(num_blocks=1, recompute=True)
    batch = toy_batches(1)[0]
    for mode, grad in ((False, True), (True, False), (False, False)):
        outs, sizes = [], []
        for each in (plain, model):
            with torch.set_grad_enabled(grad), LiveBytes(each, batch) as live:
                outs.append(each.train(mode)(batch['inputs']))
                sizes.append(live.peak)
        assert torch.equal(*outs) and sizes[0] == sizes[1]
    assert torch.equal(*(each.train()(batch['inputs']) for each in (plain, model)))


def test_delocalised_without_a_trace():
    model = toy(recompute=True)
    step(model)
    delocalize_(model.backbone)
    assert recomputed(model) == []
    assert not any(isinstance(module, DeferrableReLU) for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.backbone.modules())


def test_an_input_that_is_changed_in_place_is_refused():
    model = toy(num_blocks=1, recompute=['layer1.0'])
    kept = []
    model.backbone.stem.register_forward_hook(lambda module, args, output: kept.append(output))
    loss = model(**toy_batches(1)[0], mode='loss')['loss_ce']
    kept[0].detach().add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


@pytest.mark.parametrize(
    ('layers', 'way', 'message'),
    [
        ([nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)], 'full', 'modified by an inplace operation'),
        ([nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)], 'selective', 'has been mutated'),
    ],
)
def test_a_saved_output_that_is_changed_in_place_is_refused(layers, way, message):
    unit, x = nn.Sequential(*layers), torch.randn(1, 8, 4, 4, requires_grad=True)
    recompute_(unit, way == 'selective')
    y = unit(x * 1).square().sum()
    with pytest.raises(RuntimeError, match=message):
        y.backward()


def test_another_number_of_saved_tensors_is_refused():
    class Wavering(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.sin() if self.calls == 2 else x.sin().sin()

    unit = Wavering()
    recompute_(unit)
    with pytest.raises(CheckpointError, match='A different number of tensors was saved'):
        unit(torch.randn(3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize('partition', ['stage', ['stem', 'layer2.0']], ids=str)
def test_a_stem_image_by_image(partition):
    pytest.importorskip('mmdet')
    models = []
    for recompute in (False, ['stem', 'layer1.0']):
        torch.manual_seed(0)
        net = {'type': 'mmdet.ResNet', 'depth': 18, 'base_channels': 8, 'norm_eval': False, 'frozen_stages': -1}
        net |= {'out_indices': (3,), 'num_stages': 4}
        backbone = {'type': 'mmman.LocalBackbone', 'backbone': net, 'num_blocks': 3, 'partition': partition}
        backbone |= {'local_head': {'type': 'PooledHead'}, 'recompute': recompute}
        model = MODELS.build({'type': 'mmman.ToyClassifier', 'backbone': backbone, 'channels': (64,)}).double()
        sync(model)
        models.append(model.train())
    plain, again = models
    boundaries = []
    again.backbone.maxpool.register_forward_hook(lambda module, args, out: boundaries.append(out.shape))
    for batch in toy_batches(2, pixels=64):
        for model in models:
            step(model, wrapper(model, lr=0.01), batch)
    for (name, ours), theirs in zip(again.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f'{name}: {text}')
    assert boundaries == [(4, 8, 16, 16)] * 2 and recomputed(again)[0] == 'backbone.conv1'
    again.eval().load_state_dict(plain.eval().state_dict())
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(again.backbone.conv1(x), plain.backbone.conv1(x))
    copied = copy.deepcopy(again).backbone
    assert copied.conv1.forward.backbone is copied
    delocalize_(again.backbone)
    assert not recomputed(again)
