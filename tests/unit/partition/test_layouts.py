"""Layouts on small backbones: which modules make a unit, and which units make outputs."""

from types import SimpleNamespace

import pytest
from torch import nn

from mmman.partition.calls import call, call_on_map, call_on_tokens
from mmman.partition.layouts import (
    first_two,
    in_pairs,
    isotropic,
    one_each,
    output_norms,
    own_tensors,
    pyramid,
    staged,
    stem,
    stem_in_list,
)


class Staged(nn.Module):
    def __init__(self, out_indices):
        super().__init__()
        self.out_indices = out_indices
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.layers = nn.ModuleList([nn.Sequential(*(nn.Identity() for _ in range(4))), nn.Identity()])
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight))
        self.register_buffer('grid', self.scale.detach().clone())


LAYERS = ['layers.0', 'layers.1']


@pytest.mark.parametrize(
    ('group', 'units'),
    [
        (one_each, ['stem', 'layers.0.0', 'layers.0.1', 'layers.0.2', 'layers.0.3', 'layers.1']),
        (first_two, ['stem', 'layers.0.1', 'layers.0.2', 'layers.0.3', 'layers.1']),
        (in_pairs, ['stem', 'layers.0.1', 'layers.0.3', 'layers.1']),
    ],
)
def test_a_stage_is_a_sequence_of_units_or_one_unit(group, units):
    chain = staged(Staged((1, 0)), stem('stem'), LAYERS, group=group)
    assert [unit.name for unit in chain.units] == units
    assert [unit.stage for unit in chain.units] == [0] * (len(units) - 1) + [1]
    assert chain.out_units == (len(units) - 2, len(units) - 1)


@pytest.mark.parametrize(('out_indices', 'out_units'), [((0, 2), (0, 5)), ((2, 1, 0), (0, 4, 5)), ((1,), (4,)), ((-1,), ())])
def test_a_stem_in_the_list_of_stages_is_stage_0(out_indices, out_units):
    assert stem_in_list(Staged(out_indices), ['stem', *LAYERS]).out_units == out_units


def test_an_embedding_and_a_norm_are_part_of_the_units_next_to_them():
    stages = [
        ({'embed0': call_on_map}, [{'block0': call, 'position': call}, {'block1': call}], {'norm0': call_on_tokens}),
        ({'embed1': call_on_map}, [{'block2': call}], {}),
    ]
    chain = pyramid(stages, (1, 0))
    assert [(unit.name, unit.modules, unit.output, unit.stage) for unit in chain.units] == [
        ('block0', ('embed0', 'block0', 'position'), 'position', 0),
        ('block1', ('block1', 'norm0'), 'norm0', 0),
        ('block2', ('embed1', 'block2'), 'block2', 1),
    ]
    assert chain.units[1].calls == (call, call_on_tokens)
    assert chain.out_units == (1, 2) and chain.needs_hw_shape


@pytest.mark.parametrize(
    ('joins_first_layer', 'units', 'out_units'),
    [(False, [('stem',), ('layers.0',), ('layers.1',)], (2,)), (True, [('stem', 'layers.0'), ('layers.1',)], (1,))],
)
def test_layers_of_one_width(joins_first_layer, units, out_units):
    chain = isotropic(
        Staged([1]), ('stem',), 'layers', ('scale',), joins_first_layer=joins_first_layer, extra_tokens=2, input_size=(8, 8)
    )
    assert [unit.modules for unit in chain.units] == units
    assert chain.units[0].tensors == ('scale',) and chain.units[0].output == units[0][-1]
    assert (chain.out_units, chain.extra_tokens, chain.input_size) == (out_units, 2, (8, 8))


def test_norms_follow_the_order_of_the_outputs():
    assert output_norms(SimpleNamespace(out_indices=(3, 0))) == {0: 'norm0', 1: 'norm3'}


def test_parameters_and_buffers_are_own_tensors_and_only_parameters_are_trained():
    backbone = Staged([1])
    assert own_tensors(backbone, 'scale', 'grid', 'stem', 'other') == ('scale', 'grid')
    unit = stem('stem', tensors=('scale', 'grid'))
    assert [*unit.parameters(backbone)] == [*backbone.stem.parameters(), backbone.scale]
