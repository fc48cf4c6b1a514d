"""Which row is chosen, and what is said if none fits."""

import pytest

from mmman.errors import CostError
from mmman.planning.choice import LOCAL, SAME, Changes, FitRow, Limits, choose_row, images_that_fit, what_would_fit
from mmman.planning.costs import Peak


def row(name, total, flops, trains=SAME, static=100):
    images = total - static
    parts = {'without local heads': static, 'activations and outputs': images // 2, 'transient': images - images // 2}
    return FitRow(name, trains, Changes(), Peak(total, 'here', parts), flops)


ROWS = [
    row('as it is', 1000, 100),
    row('recompute', 800, 130),
    FitRow('half', 'not the same numbers', Changes(), note='no'),
    row('two blocks', 600, 108, LOCAL),
    row('three blocks', 500, 125, LOCAL),
    FitRow('nine blocks', LOCAL, Changes(), note='too few units', is_available=False),
]


@pytest.mark.parametrize(
    ('limits', 'number', 'expected'),
    [
        (Limits(memory=1000), None, 'as it is'),
        (Limits(memory=900), None, 'recompute'),
        (Limits(memory=900, overhead=0.1), None, 'two blocks'),
        (Limits(memory=550), None, 'three blocks'),
        (Limits(), None, 'three blocks'),
        (Limits(overhead=0.1), None, 'two blocks'),
        (Limits(overhead=0.0), None, 'as it is'),
        (Limits(memory=900), 5, 'three blocks'),
        (Limits(memory=900), 3, 'half'),
    ],
)
def test_choice(limits, number, expected):
    assert choose_row(ROWS, limits, 8, number).name == expected


@pytest.mark.parametrize(('number', 'message'), [(7, 'from 1 to 6'), (6, 'nine blocks: too few units')])
def test_numbers_are_checked(number, message):
    with pytest.raises(CostError, match=f'--choose {number}: .*{message}'):
        choose_row(ROWS, Limits(), 8, number)


def test_nothing_fits():
    with pytest.raises(CostError, match='nothing fits: the smallest peak'):
        choose_row(ROWS, Limits(memory=300), 8)
    large = [row('as it is', 9_000_000, 100), row('two blocks', 5_000_000, 108, LOCAL)]
    text = what_would_fit(large, Limits(memory=4_500_000), batch=1)
    assert text == 'the smallest peak is 5.0 MB (two blocks), 0.5 MB too much'
    text = what_would_fit(ROWS, Limits(memory=300), batch=8)
    assert 'about 4 of 8 images would fit (--batch 4)' in text  # 400 bytes of 8 images, 200 left
    assert 'no batch would fit' in what_would_fit(ROWS, Limits(memory=90), batch=8)


def test_images_that_fit():
    assert images_that_fit(ROWS[0], 550, 8) == 4
    assert images_that_fit(ROWS[0], 100, 8) == 0
    assert images_that_fit(ROWS[0], 5000, 8) == 8
