"""The paper's equations against numbers computed by hand, the paper's own examples, and exact fractions."""

from fractions import Fraction

import pytest

from mmman.analysis.paper_cost import (
    CHANNEL,
    UNIT,
    Bias,
    activation_ratio,
    choose_blocks,
    expected_extra_parameters,
    flops_ratio,
    max_blocks,
    min_blocks,
)
from mmman.errors import CostError

NOTHING = Bias(0, 0, 0)
HALVES = Bias(parameters=0.5, flops=0.25, activations=0.75)


def test_eq_8_extra_parameters():
    sizes = [10, 20, 30, 60]  # 30 on average
    assert expected_extra_parameters(sizes, 3, HALVES) == 2 * 1.5 * 30
    assert expected_extra_parameters(sizes, 1, HALVES) == 0


def test_eq_13_flops_ratio():
    assert flops_ratio(8, 3, HALVES) == 1 + 0.25 * 1.125
    assert flops_ratio(8, 1, UNIT) == 1
    assert flops_ratio(8, 3, HALVES) == (2 * 8 + 2 * 2.25) / (2 * 8)  # Eq. 12 over Eq. 11, in FLOPs of a layer


def test_slip_eq_13_at_k_equal_l_is_100_percent_and_not_51():
    assert flops_ratio(101, 101, CHANNEL) == pytest.approx(2.0)  # 1 + 100/101 * 1.01
    assert flops_ratio(10**6, 10**6, CHANNEL) == pytest.approx(2.01, abs=1e-5)  # 2 + β_F/2, as the paper says itself


def test_eq_14_the_papers_example():
    """L = 101, β_F = 0.02, ε = 0.1: up to K = 11, exactly."""
    assert max_blocks(101, 0.1, CHANNEL) == 11
    assert max_blocks(100, 0.1, CHANNEL) == 10
    assert max_blocks(101, 0.1, UNIT) == 6  # the experiments' bias: 1 + 10.1 / 2
    assert max_blocks(7, 0, UNIT) == 1
    assert max_blocks(7, 100, UNIT) == 7


def test_eq_17_activation_ratio():
    assert activation_ratio(8, 4, HALVES) == (2 * 10 + 1.75 * 10) / (8 * 10)  # Eq. 16 over Eq. 15, 10 bytes a layer
    assert activation_ratio(2, 2, CHANNEL) == pytest.approx(1.01)


def test_slip_eq_17_puts_a_head_on_the_only_block():
    assert activation_ratio(8, 1, UNIT) == 1


def test_slip_eq_18_the_papers_example_takes_5_blocks_and_not_4():
    """L = 50, β_A = 0.02, rho = 0.25: 1 / (0.25 - 0.0204) = 4.36."""
    assert min_blocks(50, 0.25, CHANNEL) == 5
    assert activation_ratio(50, 4, CHANNEL) == pytest.approx(0.2704)
    assert activation_ratio(50, 5, CHANNEL) == pytest.approx(0.2204)


def test_slip_eq_18_allows_more_blocks_than_layers():
    """rho = 0.3 is above (1 + β_A) / L = 0.255, yet takes 22.2 of 4 layers."""
    with pytest.raises(CostError, match='ratio=0.3 is out of reach: 4 layers in 4 blocks give 0.505; choose a larger ratio'):
        min_blocks(4, 0.3, CHANNEL)


def test_the_experiments_bias_is_not_the_examples():
    """A second copy of the layer doubles the FLOPs and activations that a head adds."""
    assert (UNIT.parameters, UNIT.activations) == (1, 1)
    assert flops_ratio(10, 2, UNIT) - 1 == pytest.approx(2 * (flops_ratio(10, 2, NOTHING) - 1))
    assert activation_ratio(50, 5, UNIT) == pytest.approx(0.24)


@pytest.mark.parametrize('bias', [NOTHING, CHANNEL, UNIT])
@pytest.mark.parametrize('layers', [1, 2, 3, 7, 50])
def test_bounds_on_k_are_tight(layers, bias):
    """Against a search over all K in exact arithmetic; goals that a K meets exactly among them."""
    beta_f, beta_a = Fraction(str(bias.flops)), Fraction(str(bias.activations))
    overheads = {k: Fraction(k - 1, layers) * (1 + beta_f / 2) for k in range(1, layers + 1)}
    ratios = {k: Fraction(1, k) + (1 + beta_a) / layers for k in range(2, layers + 1)}
    for goal in [Fraction(1, 10), Fraction(1, 3), *overheads.values()]:
        assert max_blocks(layers, float(goal), bias) == max(k for k, value in overheads.items() if value <= goal)
    for goal in [Fraction(1, 10), Fraction(1, 3), Fraction(9, 10), *(value for value in ratios.values() if value < 1)]:
        fitting = [k for k, value in ratios.items() if value <= goal]
        if fitting:
            assert min_blocks(layers, float(goal), bias) == min(fitting)
        else:
            with pytest.raises(CostError, match='out of reach'):
                min_blocks(layers, float(goal), bias)


def test_guideline():
    # Eq. 18: 1 / (0.25 - 0.0101) = 4.17; Eq. 14: 11
    assert choose_blocks(101, 0.25, 0.1, CHANNEL) == range(5, 12)
    with pytest.raises(
        CostError, match='ratio=0.1 needs at least 13 blocks, overhead=0.1 allows at most 6; allow an overhead of 0.2376'
    ):
        choose_blocks(101, 0.1, 0.1, UNIT)


@pytest.mark.parametrize(
    'ask, message',
    [
        (lambda: flops_ratio(0, 1), 'layers=0: must be an integer of at least 1'),
        (lambda: flops_ratio(4.0, 1), 'layers=4.0: must be an integer'),
        (lambda: flops_ratio(4, 0), 'num_blocks=0 of 4 layers: choose an integer from 1 to 4'),
        (lambda: activation_ratio(4, 5), 'num_blocks=5 of 4 layers'),
        (lambda: activation_ratio(4, 2.0), 'num_blocks=2.0 of 4'),
        (lambda: Bias(-0.1, 0, 0), 'Bias.parameters=-0.1: must be a finite number of at least 0'),
        (lambda: Bias(0, float('nan'), 0), 'Bias.flops=nan'),
        (lambda: expected_extra_parameters([3, 0], 1), 'a layer of 0 parameters'),
        (lambda: expected_extra_parameters([], 1), 'layers=0'),
        (lambda: expected_extra_parameters([3, float('inf')], 1), 'a layer of inf parameters'),
        (lambda: max_blocks(4, -0.1), 'overhead=-0.1'),
        (lambda: min_blocks(4, 0), 'ratio=0: '),
        (lambda: min_blocks(4, 1), 'ratio=1: '),
        (lambda: min_blocks(4, 25), 'ratio=25: '),
    ],
)
def test_impossible_input_says_what_to_change(ask, message):
    with pytest.raises(CostError, match=message):
        ask()
