"""Bandwidths, times, links and networks."""

import pytest

from mmman import LocalLearningError
from mmman.experimental.scaling import Link, Network, parse_bandwidth, parse_time


@pytest.mark.parametrize('text, value', [('25GB/s', 25e9), ('200Gb/s', 25e9), (' 1.5 MB/s', 1.5e6), ('8b/s', 1)])
def test_bandwidths(text, value):
    assert parse_bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize('text, value', [('10us', 1e-5), ('1.5ms', 1.5e-3), ('0s', 0), ('3ns', 3e-9)])
def test_times(text, value):
    assert parse_time(text) == pytest.approx(value)


@pytest.mark.parametrize(
    'mistake, says',
    [
        (lambda: parse_bandwidth('25'), "write bytes as '25GB/s'"),
        (lambda: parse_bandwidth('0GB/s'), 'above 0'),
        (lambda: parse_time('10'), 'with its unit'),
        (lambda: parse_time('-1us'), 'with its unit'),
        (lambda: Link(0.0), 'above 0'),
        (lambda: Link(1.0, -1.0), 'at least 0'),
        (lambda: Network(machine=0), 'at least 1'),
    ],
)
def test_mistakes_say_what_to_change(mistake, says):
    with pytest.raises(LocalLearningError, match=says) as caught:
        mistake()
    assert '\n' not in str(caught.value)
