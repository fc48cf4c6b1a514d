import pytest

from mmman.errors import PartitionError
from mmman.partition import Chain, Unit, plan_blocks


def chain(*units_a_stage, stem=True):
    units = [Unit.single('stem', 0)] if stem else []
    for stage, count in enumerate(units_a_stage):
        units += [Unit.single(f'layer{stage + 1}.{i}', stage) for i in range(count)]
    return Chain(tuple(units), (len(units) - 1,))


def ends(chain, num_blocks=None, partition='stage', frozen=0):
    plan = plan_blocks(chain, [i >= frozen for i in range(len(chain.units))], num_blocks, partition)
    assert plan.frozen == chain.units[:frozen]
    assert sum(plan.blocks, plan.frozen) == chain.units
    return [block[-1].name.removeprefix('layer') for block in plan.blocks]


R50, R32 = chain(3, 4, 6, 3), chain(5, 5, 5)


@pytest.mark.parametrize(
    ('num_blocks', 'expected'),
    [
        (1, ['4.2']),
        (2, ['2.3', '4.2']),
        (3, ['2.3', '3.5', '4.2']),
        (4, ['1.2', '2.3', '3.5', '4.2']),
        (5, ['1.2', '2.3', '3.2', '3.5', '4.2']),
        (17, ['stem', *(f'{s + 1}.{u}' for s, n in enumerate((3, 4, 6, 3)) for u in range(n))]),
    ],
)
def test_by_stage(num_blocks, expected):
    assert ends(R50, num_blocks) == expected


def test_frozen_stages_are_no_blocks():
    assert ends(R50, 3, frozen=4) == ['2.3', '3.5', '4.2']
    assert ends(R50, 4, frozen=4) == ['2.3', '3.2', '3.5', '4.2']
    assert ends(R50, 2, 'uniform', frozen=4) == ['3.1', '4.2']


def test_uniform_cuts_of_the_paper():
    assert ends(R32, 8, 'uniform') == ['1.0', '1.2', '1.4', '2.1', '2.3', '3.0', '3.2', '3.4']
    assert ends(R32, 16, 'uniform') == ['stem', *(f'{s}.{u}' for s in (1, 2, 3) for u in range(5))]
    assert len(ends(chain(18, 18, 18), 32, 'uniform')) == 32


def test_named_cuts():
    r101 = chain(3, 4, 23, 3)
    assert ends(r101, 4, ['layer2.2', 'layer3.8', 'layer3.16']) == ['2.2', '3.8', '3.16', '4.2']
    assert ends(r101, None, ['stem']) == ['stem', '4.2']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_blocks': 18}, r'num_blocks=18, but the backbone has 17 trainable units \(stem, layer1.0'),
        ({'num_blocks': 0}, 'choose a K from 1'),
        ({}, "num_blocks is needed with partition='stage'"),
        ({'num_blocks': 2, 'partition': 'balanced'}, "choose 'stage', 'uniform' or a list"),
        ({'partition': ['layer9.9']}, r"cannot cut after 'layer9.9'; choose from the units stem, layer1.0"),
        ({'partition': ['layer4.2']}, "after 'layer4.2'"),
        ({'partition': ['layer3.0', 'layer2.0']}, 'not in the order of the network'),
        ({'partition': ['layer2.0', 'layer2.0']}, 'not in the order of the network'),
        ({'num_blocks': 3, 'partition': ['layer2.0']}, 'names 1 cuts, so 2 blocks, but num_blocks=3'),
        ({'num_blocks': 1, 'frozen': 17}, r'every unit of the backbone is frozen \(stem, .*lower frozen_stages'),
        ({'num_blocks': 14, 'frozen': 4}, r'13 trainable units .* \(frozen: stem, layer1.0'),
        ({'partition': ['layer1.1'], 'frozen': 4}, "after 'layer1.1'"),
    ],
)
def test_cuts_that_do_not_fit(arguments, message):
    with pytest.raises(PartitionError, match=message):
        ends(R50, **arguments)
