"""LAM: which units it copies, their weights, and names that don't fit. Training is in tests/parity/test_mlaan.py."""

import pytest
import torch
from mmengine.registry import MODELS

from mmman.errors import ConfigError
from mmman.heads.lam import _leap
from mmman.partition import Unit
from tests.toy import toy_config

TRANSFER = {'source_unit': 'next_stage', 'scale': False}
NET = {'units': (1, 2, 3)}
HEAD = {'type': 'mmman.ToyLinearHead', 'num_classes': 5}


def heads(transfer=TRANSFER, num_blocks=6, **options):
    local_head = {'type': 'mmman.LAMLocalHead', 'head': HEAD, **options}
    model = MODELS.build(toy_config(num_blocks, transfer=transfer, net=NET, local_head=local_head))
    return [*model.backbone.local.values()], model


def chain(*counts):
    stages = [Unit.single(f'{stage}.{i}', stage - 1) for stage, count in enumerate(counts, start=1) for i in range(count)]
    return [Unit.single('stem', 0), *stages]


# The units that MLAAN's code samples for ResNet-32, after the unit that the transfer copies.
@pytest.mark.parametrize(
    ('source', 'names'),
    [
        ('2.0', '3.0 3.2 3.4'), ('3.0', '3.2 3.3 3.4'), ('3.1', '3.2 3.3 3.4'), ('3.2', '3.3 3.4'), ('3.3', '3.4'), ('3.4', ''),
    ],
)  # fmt: skip
def test_the_units_of_the_authors(source, names):
    units = chain(5, 5, 5)
    position = [unit.name for unit in units].index(source)
    assert [units[i].name for i in _leap(units, position, 3)] == names.split()


def test_fewer_units_than_stages():
    units = chain(2, 2, 2, 2)
    assert [units[i].name for i in _leap(units, 1, 2)] == ['2.0', '3.0']
    assert _leap(units, 1, 0) == []


def test_units_are_new_and_start_as_the_backbones():
    local, model = heads()
    assert [(head.source.name, head.unit_names) for head in local] == [
        ('layer2.0', ['layer3.0', 'layer3.1', 'layer3.2']),
        ('layer2.0', ['layer3.0', 'layer3.1', 'layer3.2']),
        ('layer3.0', ['layer3.1', 'layer3.2']),
        ('layer3.0', ['layer3.1', 'layer3.2']),
        ('layer3.1', ['layer3.2']),
    ]
    own = {id(parameter) for parameter in model.backbone.layer3.parameters()}
    for head in local:
        parameters = [parameter for unit in head.units for parameter in unit.parameters()]
        assert all(parameter.requires_grad and id(parameter) not in own for parameter in parameters)
        assert head.units in head.unit_copies
    assert not torch.equal(local[0].units[0].conv.weight, model.backbone.layer3[0].conv.weight)
    y = torch.rand(2, 8, 8, 8)  # as layer2.0 returns it
    assert local[0].embed(y, torch.rand(2, 3, 16, 16)).shape == (2, 16)


def test_depth_counts_the_copied_unit():
    assert [len(head.units) for head in heads(depth=2)[0]] == [1] * 5
    assert [len(head.units) for head in heads(depth=1)[0]] == [0] * 5
    without = heads({'ema': False, 'bias': False, 'scale': False}, depth=2)[0]
    assert [head.unit_names for head in without[::2]] == [
        ['layer2.0', 'layer3.0'],
        ['layer3.0', 'layer3.2'],
        ['layer3.1', 'layer3.2'],
    ]
    with pytest.raises(ConfigError, match='depth=0'):
        heads(depth=0)


def test_named_units():
    local, _ = heads(units={'layer3.0': ['layer3.1'], 'layer2.0': []})
    assert [head.unit_names for head in local] == [[], [], ['layer3.1'], ['layer3.1'], ['layer3.2']]


@pytest.mark.parametrize(
    ('units', 'message'),
    [
        ({'layer2.0': ['layer9.0']}, r"local_head.units names \['layer9.0'\]: choose from the units stem, layer1.0, "),
        ({'layer9.0': ['layer3.0']}, r"local_head.units names \['layer9.0'\]"),
        ({'layer3.0': ['layer2.0']}, r"\['layer3.0', 'layer2.0'\] are not in the order of the network"),
        ({'layer3.0': ['layer3.2', 'layer3.2']}, 'are not in the order of the network'),
        ({'layer2.0': 'layer3.0'}, r"local_head.units\['layer2.0'\]='layer3.0': expected a list of unit names"),
        ({'layer2.0': ['layer3.1']}, 'layer3.1 takes 16 channels at stride 4, but gets 8 channels at stride 2'),
        (['layer3.0'], 'units'),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(units, message):
    with pytest.raises(ConfigError, match=message):
        heads(units=units)
