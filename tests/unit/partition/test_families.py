"""Off means off, for every family: class, keys and outputs of a localised backbone are the stock ones, and it can be undone."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from mmman import delocalize_, localize_, register_chain
from mmman.errors import PartitionError, UnsupportedBackboneError
from mmman.partition import Chain, Unit, chain_of
from tests.toy import ToyNet

pytestmark = pytest.mark.whole_models

HEAD = {'type': 'mmman.ToyLocalHead'}
VIT = {'embed_dims': 24, 'num_layers': 6, 'num_heads': 3, 'feedforward_channels': 48}
SWIN = {'embed_dims': 24, 'depths': [2, 2, 2, 2], 'num_heads': [1, 2, 4, 8]}
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
        ('RegNet', {'arch': 'regnetx_800mf', 'norm_eval': False}),
        ('MobileNetV2', {'out_indices': (1, 2, 4, 7)}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (2, 2, 2, 2), 'frozen_stages': 1}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (1, 2, 3, 2), 'use_abs_pos_embed': True, 'with_cp': True}),
    ],
    'mmseg': [
        ('ResNet', {'depth': 18, 'norm_eval': False}),
        ('ResNetV1c', {'depth': 50, 'strides': (1, 2, 1, 1), 'dilations': (1, 1, 2, 4), 'contract_dilation': True}),
        ('ResNetV1d', {'depth': 101, 'multi_grid': (1, 2, 4), 'norm_eval': True}),
        ('ResNeXt', {'depth': 50, 'groups': 32, 'base_width': 4, 'with_cp': True}),
        ('MobileNetV2', {'out_indices': (1, 2, 4, 6), 'strides': (1, 2, 2, 1, 1, 1, 1), 'dilations': (1, 1, 1, 2, 2, 4, 4)}),
        ('MobileNetV2', {'out_indices': (6,)}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (2, 2, 2, 2), 'out_indices': (1, 3)}),
    ],
    'mmpretrain': [
        ('ResNet', {'depth': 18}),
        ('ResNet', {'depth': 50, 'frozen_stages': 2, 'norm_eval': True, 'drop_path_rate': 0.1}),
        ('ResNetV1c', {'depth': 34, 'out_indices': (0, 1, 2, 3)}),
        ('ResNetV1d', {'depth': 50, 'with_cp': True}),
        ('ResNeXt', {'depth': 50}),
        ('SEResNet', {'depth': 50}),
        ('ResNet_CIFAR', {'depth': 18}),
        ('RegNet', {'arch': 'regnetx_400mf', 'out_indices': (0, 1, 2, 3)}),
        ('MobileNetV2', {'frozen_stages': 2}),
        ('VGG', {'depth': 11, 'num_classes': 10}),
        ('VGG', {'depth': 13, 'norm_cfg': {'type': 'BN'}, 'out_indices': (0, 2, 4), 'frozen_stages': 1}),
        ('VGG', {'depth': 16, 'with_last_pool': False}),
        ('VisionTransformer', {'arch': VIT, 'img_size': 64}),
        ('VisionTransformer', {'arch': VIT, 'out_type': 'avg_featmap', 'out_indices': [1, 4, 5], 'drop_path_rate': 0.1}),
        (
            'VisionTransformer',
            {'arch': VIT, 'out_type': 'featmap', 'out_indices': [0, 5], 'pre_norm': True, 'final_norm': False},
        ),
        ('VisionTransformer', {'arch': VIT, 'out_type': 'raw', 'with_cls_token': False, 'frozen_stages': 2}),
        ('DistilledVisionTransformer', {'arch': VIT, 'out_indices': [2, 5]}),
        ('SwinTransformer', {'arch': SWIN, 'use_abs_pos_embed': True, 'frozen_stages': 0}),
        ('SwinTransformer', {'arch': SWIN, 'out_indices': (0, 1, 2, 3), 'pad_small_map': True, 'with_cp': True}),
        ('SwinTransformer', {'arch': SWIN, 'out_indices': (1, 3), 'pad_small_map': True, 'out_after_downsample': True}),
        ('ConvNeXt', {'arch': 'atto', 'drop_path_rate': 0.1}),
        ('ConvNeXt', {'arch': 'atto', 'out_indices': [0, 1, 2, 3], 'gap_before_final_norm': False, 'with_cp': True}),
        ('ConvNeXt', {'arch': 'atto', 'use_grn': True, 'layer_scale_init_value': 0.0, 'frozen_stages': 1}),
    ],
    'mmman': [
        ('CIFARResNet', {'depth': 32}),
        ('CIFARResNet', {'depth': 20, 'out_indices': (0, 2)}),
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
    return pytree.tree_leaves(backbone(torch.randn(2, 3, *chain_of(backbone).input_size)))


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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in local.modules())
    assert len(modes) == len([*local.modules()])
    for ours, theirs in zip(outputs(local, True), outputs(stock, True), strict=True):
        assert torch.equal(ours, theirs)


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
        ('mmpretrain', 'HRNet', {'arch': 'w18'}),
        ('mmpretrain', 'SwinTransformerV2', {}),
    ],
)
def test_another_forward_is_refused_by_name(library, kind, options):
    with pytest.raises(UnsupportedBackboneError, match=f'^{kind} cannot be cut .* mmdet.models.backbones.resnet.ResNet.*how'):
        localize_(build(library, kind, options), 2, HEAD)


def test_units_that_pass_on_several_tensors_are_refused():
    stages = {'num_stages': 3, 'strides': (1, 2, 2), 'dilations': (1, 1, 1), 'out_indices': (2,)}
    branches = {'num_branch': 3, 'test_branch_idx': -1, 'trident_dilations': (1, 2, 3)}
    with pytest.raises(UnsupportedBackboneError, match='^TridentResNet cannot be cut .* does not return a single'):
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
    register_chain(f'{Wrong.__module__}.{Wrong.__qualname__}')(lambda backbone: Chain(units[::-1], (0, 6)))
    with pytest.raises(UnsupportedBackboneError, match='does not run the units of its chain in order .* correct the'):
        localize_(Wrong(), 2, HEAD)
    with pytest.raises(ValueError, match='already registered'):
        register_chain(f'{Wrong.__module__}.{Wrong.__qualname__}')


def test_a_unit_whose_output_is_not_its_last_module_is_refused():
    class Inner(ToyNet):
        def forward(self, x):
            return super().forward(x)

    units = (Unit.single('stem', 0), Unit('both', ('layer1.0', 'layer1.1'), 'layer1.0', 0))
    register_chain(f'{Inner.__module__}.{Inner.__qualname__}')(lambda backbone: Chain(units, (1,)))
    with pytest.raises(UnsupportedBackboneError, match='the output of the unit both is not that of its last module'):
        chain_of(Inner())


def test_a_last_block_without_an_output_is_refused():
    with pytest.raises(PartitionError, match='produces none of the outputs of ToyNet'):
        localize_(ToyNet(out_indices=(0, 1)), 3, HEAD)


def test_every_unit_is_in_one_block_and_owns_its_parameters():
    backbone = build('mmdet', 'ResNet', {'depth': 50})
    owned = [p for unit in chain_of(backbone).units for p in unit.parameters(backbone)]
    assert len(owned) == len({*map(id, owned)})
    assert {*map(id, owned)} == {*map(id, backbone.parameters())}
    assert isinstance(backbone.get_submodule(chain_of(backbone).units[0].output), nn.MaxPool2d)
