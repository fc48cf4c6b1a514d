"""Linear CKA against the formula of the paper, computed another way."""

from itertools import combinations

import pytest
import torch

from mmman.analysis.cka import MinibatchCKA
from mmman.errors import ConfigError


def features(n=7, width=5, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic(x, y):
    """Song et al. (2012), Eq. 5, as it is written there."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k, m = k - k.diag().diag(), m - m.diag().diag()
    one = torch.ones(n, dtype=x.dtype)
    terms = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return terms / (n * (n - 3))


def direct(x, y):
    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def cka(*batches):
    found = MinibatchCKA()
    for x, y in batches:
        found.update([x], [y])
    return float(found.value())


def test_one_batch_is_the_direct_computation():
    x, y = features(), features(width=3, seed=1)
    y[:, 0] += x[:, 0]
    assert 0.05 < abs(direct(x, y)) < 0.95
    assert cka((x, y)) == pytest.approx(direct(x, y), rel=1e-12)


def test_minibatches_give_the_value_of_the_whole():
    """HSIC's estimator is a U-statistic of degree 4: its mean over all subsets of the data is its value on the data."""
    x, y = features(), features(width=3, seed=1)
    y[:, 0] += x[:, 0]
    subsets = [[*subset] for subset in combinations(range(7), 5)]
    assert cka(*((x[subset], y[subset]) for subset in subsets)) == pytest.approx(direct(x, y), rel=1e-10)


def test_the_same_features_give_one():
    x = features()
    rotation = torch.linalg.qr(features(5, 5, seed=2))[0]
    assert cka((x, x)) == pytest.approx(1, rel=1e-12)
    assert cka((x, -3 * x @ rotation + 2)) == pytest.approx(1, rel=1e-12)
    assert cka((x, x @ torch.diag(torch.tensor([1, 1, 1, 1, 9.0]).double()))) < 0.9  # not a rotation


def test_unrelated_features_give_zero_on_average():
    batches = [(features(6, 50, seed=i), features(6, 50, seed=1000 + i)) for i in range(200)]
    assert abs(cka(*batches)) < 0.05  # the biased estimator gives more than 0.8


def test_a_large_mean_costs_no_precision():
    x, y = features().float(), features(seed=1).float()
    assert cka((x + 1000, y)) == pytest.approx(cka((x, y)), abs=1e-3)


def test_every_layer_against_every_other():
    x, y, z = features(), features(seed=1).reshape(7, 1, 5, 1), features(seed=2)
    found = MinibatchCKA()
    found.update([x, y, z], [y, x])
    assert found.value().shape == (3, 2)
    assert found.value()[0, 1] == pytest.approx(1) and found.value()[1, 0] == pytest.approx(1)
    assert found.value()[2, 1] == pytest.approx(direct(z, x), rel=1e-12)


def test_wrong_batches_are_refused():
    found = MinibatchCKA()
    with pytest.raises(ConfigError, match='at least one batch'):
        found.value()
    for first, second in ((3, 3), (5, 6)):
        with pytest.raises(ConfigError, match='at least 4 a batch'):
            found.update([features(first)], [features(second)])
