"""Which backbones have a chain, and how the others are refused."""

import importlib

import pytest
import torch
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
    [('mmdet', 'DetectoRS_ResNet', {'depth': 50}), ('mmpretrain', 'LeNet5', {}), ('mmpretrain', 'AlexNet', {})],
)
def test_another_forward_is_refused_by_name(library, kind, options):
    with pytest.raises(UnsupportedBackboneError, match=f'^{kind} cannot be cut .* mmdet.models.backbones.resnet.ResNet.*how'):
        localize_(build(library, kind, options), 2, HEAD)


@pytest.mark.parametrize(
    ('library', 'kind', 'options', 'reason'),
    [
        ('mmseg', 'UNet', {}, 'every stage of the decoder takes the output of an encoder stage, too'),
        ('mmpretrain', 'HRNet', {'arch': 'w18'}, 'its branches of several resolutions exchange features'),
    ],
)
def test_what_is_no_chain_is_refused_with_the_reason(library, kind, options, reason):
    with pytest.raises(UnsupportedBackboneError, match=f'^{kind} cannot be cut into blocks: {reason}.*supported_models.md'):
        localize_(build(library, kind, options), 2, HEAD)


def test_rows_name_classes_that_define_a_forward():
    """And no class is in both tables."""
    assert not _FAMILIES.keys() & NO_CHAIN.keys()
    paths = [path for path in (*_FAMILIES, *NO_CHAIN) if path.startswith(('mmdet.', 'mmseg.', 'mmpretrain.'))]
    for path in paths:
        module, _, name = path.rpartition('.')
        pytest.importorskip(module.partition('.')[0])
        assert 'forward' in vars(getattr(importlib.import_module(module), name)), path


def test_the_docs_name_what_is_no_chain_and_why():
    """Classes of one name and one reason share a row."""
    rows = {}
    for path, reason in NO_CHAIN.items():
        library, name = path.partition('.')[0], path.rpartition('.')[2]
        rows.setdefault((name, reason), []).append(library.replace('mmseg', 'mmsegmentation'))
    text = (ROOT / 'docs' / 'supported_models.md').read_text()
    section = text[text.index('### No chain') : text.index('## Stock configs')]
    table = [line for line in section.splitlines() if line.startswith('| ') and not line.startswith('| backbone |')]
    assert sorted(table) == sorted(f'| {name} | {", ".join(libraries)} | {why} |' for (name, why), libraries in rows.items())


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
