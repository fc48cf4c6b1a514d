"""Off means off, for every family: class, keys and outputs of a localised backbone are the stock ones, and it can be undone."""

import pytest
import torch
from torch import nn

from mmman import delocalize_, localize_, register_chain
from mmman.errors import UnsupportedBackboneError
from mmman.partition import Chain, Unit, chain_of
from tests.toy import ToyNet

HEAD = {'type': 'mmman.ToyLocalHead'}
FAMILIES = {
    'mmdet': [
        ('ResNet', {'depth': 18}),
        ('ResNet', {'depth': 34, 'frozen_stages': 1, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'with_cp': True}),
        ('ResNet', {'depth': 101, 'style': 'caffe', 'norm_cfg': {'type': 'BN', 'requires_grad': False}}),
        ('ResNet', {'depth': 152, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'deep_stem': True, 'avg_down': True, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'strides': (1, 2, 2, 1), 'dilations': (1, 1, 1, 2), 'out_indices': (1, 3)}),
        ('ResNetV1d', {'depth': 50}),
        ('ResNeXt', {'depth': 50, 'groups': 32, 'base_width': 4}),
        ('Res2Net', {'depth': 50, 'scales': 4, 'base_width': 26, 'norm_eval': False}),
        ('ResNeSt', {'depth': 50, 'stem_channels': 64, 'norm_eval': False}),
    ],
    'mmseg': [
        ('ResNet', {'depth': 18, 'norm_eval': False}),
        ('ResNetV1c', {'depth': 50, 'strides': (1, 2, 1, 1), 'dilations': (1, 1, 2, 4), 'contract_dilation': True}),
        ('ResNetV1d', {'depth': 101, 'multi_grid': (1, 2, 4), 'norm_eval': True}),
        ('ResNeXt', {'depth': 50, 'groups': 32, 'base_width': 4, 'with_cp': True}),
    ],
    'mmpretrain': [
        ('ResNet', {'depth': 18}),
        ('ResNet', {'depth': 50, 'frozen_stages': 2, 'norm_eval': True, 'drop_path_rate': 0.1}),
        ('ResNetV1c', {'depth': 34, 'out_indices': (0, 1, 2, 3)}),
        ('ResNetV1d', {'depth': 50, 'with_cp': True}),
        ('ResNeXt', {'depth': 50}),
        ('SEResNet', {'depth': 50}),
    ],
}
CASES = [(library, kind, options) for library, rows in FAMILIES.items() for kind, options in rows]


def build(library, kind, options):
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(library):
        return MODELS.build({'type': f'{library}.{kind}', **options})


@torch.no_grad()
def outputs(backbone, train):
    backbone.train(train)
    torch.manual_seed(1)  # drop path
    return backbone(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(('library', 'kind', 'options'), CASES)
def test_off_means_off(library, kind, options):
    stock = build(library, kind, options)
    local = build(library, kind, options)
    local.load_state_dict(stock.state_dict())
    class_, keys, modes = type(local), list(local.state_dict()), [module.training for module in local.modules()]
    assert localize_(local, 3, HEAD) is local

    assert type(local) is class_
    assert [key for key in local.state_dict() if not key.startswith('local.')] == keys
    for train in (False, True):
        for ours, theirs in zip(outputs(local, train), outputs(stock, train), strict=True):
            assert torch.equal(ours, theirs)
    for key, value in stock.state_dict().items():
        assert torch.equal(local.state_dict()[key], value), key

    assert delocalize_(local) is local
    assert list(local.state_dict()) == keys
    assert [*dict(local.named_modules())] == [*dict(stock.named_modules())]
    assert not any(module._forward_hooks for module in local.modules())
    assert len(modes) == len([*local.modules()])
    for ours, theirs in zip(outputs(local, True), outputs(stock, True), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_a_segmentor_names_reach_the_stock_backbone():
    pytest.importorskip('mmseg')
    stock = {'type': 'mmseg.ResNetV1c', 'depth': 18}
    backbone = build('mmman', 'LocalBackbone', {'backbone': stock, 'num_blocks': 1, 'pretrained': 'a.pth'})
    assert backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'a.pth'}


def test_localising_changes_no_mode_statistics_or_random_state():
    backbone = ToyNet()
    backbone.layer1[0].bn.eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    localize_(backbone, 3, {'type': 'mmman.ToyLocalHead'})
    after = backbone.state_dict()
    assert {name: module.training for name, module in backbone.named_modules() if not name.startswith('local')} == modes
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ('library', 'kind', 'options'),
    [
        ('mmdet', 'DetectoRS_ResNet', {'depth': 50}),
        ('mmseg', 'UNet', {}),
        ('mmpretrain', 'ResNet_CIFAR', {'depth': 18}),
    ],
)
def test_another_forward_is_refused_by_name(library, kind, options):
    with pytest.raises(UnsupportedBackboneError, match=f'^{kind} cannot be cut .* mmdet.models.backbones.resnet.ResNet.*how'):
        localize_(build(library, kind, options), 2, HEAD)


def test_units_that_pass_on_several_tensors_are_refused():
    stages = {'num_stages': 3, 'strides': (1, 2, 2), 'dilations': (1, 1, 1), 'out_indices': (2,)}
    branches = {'num_branch': 3, 'test_branch_idx': -1, 'trident_dilations': (1, 2, 3)}
    with pytest.raises(UnsupportedBackboneError, match='^TridentResNet cannot be cut .* no single'):
        localize_(build('mmdet', 'TridentResNet', {'depth': 50, **stages, **branches}), 2, HEAD)


def test_a_patched_forward_is_refused():
    backbone = ToyNet()
    backbone.forward = backbone.forward
    with pytest.raises(UnsupportedBackboneError, match='replaced on the instance'):
        chain_of(backbone)


def test_a_row_that_names_the_wrong_units_is_refused():
    class Wrong(ToyNet):
        def forward(self, x):
            return super().forward(x)

    units = chain_of(ToyNet()).units
    register_chain(f'{Wrong.__module__}.{Wrong.__qualname__}')(lambda backbone: Chain(units[::-1], (0, 1)))
    with pytest.raises(UnsupportedBackboneError, match='not what its forward pass runs'):
        localize_(Wrong(), 2, HEAD)
    with pytest.raises(ValueError, match='registered already'):
        register_chain(f'{Wrong.__module__}.{Wrong.__qualname__}')


def test_a_unit_of_several_modules_is_refused_but_for_the_first():
    class Pairs(ToyNet):
        def forward(self, x):
            return super().forward(x)

    units = (Unit('stem', ('stem',), 'stem', 0), Unit('both', ('layer1.0', 'layer1.1'), 'layer1.1', 0))
    register_chain(f'{Pairs.__module__}.{Pairs.__qualname__}')(lambda backbone: Chain(units, (1,)))
    with pytest.raises(UnsupportedBackboneError, match='unit both is not one module'):
        chain_of(Pairs())


def test_a_backbone_that_returns_a_bare_tensor_is_refused():
    class Bare(ToyNet):
        def forward(self, x):
            return super().forward(x)[-1]

    chain = chain_of(ToyNet(out_indices=(2,)))
    register_chain(f'{Bare.__module__}.{Bare.__qualname__}')(lambda backbone: chain)
    with pytest.raises(UnsupportedBackboneError, match='not what its forward pass runs'):
        localize_(Bare(), 2, HEAD)


def test_every_unit_is_in_one_block_and_owns_its_parameters():
    backbone = build('mmdet', 'ResNet', {'depth': 50})
    owned = [p for unit in chain_of(backbone).units for p in unit.parameters(backbone)]
    assert len(owned) == len({*map(id, owned)})
    assert {*map(id, owned)} == {*map(id, backbone.parameters())}
    assert isinstance(backbone.get_submodule(chain_of(backbone).units[0].output), nn.MaxPool2d)
