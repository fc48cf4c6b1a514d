"""Which backbones have a chain, and how the others are refused."""

import importlib

import pytest
from torch import nn

from mmman import localize_, register_chain
from mmman.errors import PartitionError, UnsupportedBackboneError
from mmman.partition import Chain, Unit, chain_of
from mmman.partition.families import _FAMILIES, NO_CHAIN
from tests.conftest import ROOT
from tests.toy import ToyNet
from tests.unit.partition.off import HEAD, build

pytestmark = pytest.mark.whole_models


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
