"""Predicted beside measured times. Real processes are measured in tests/unit/tools/analysis_tools/test_simulate_scaling.py."""

import pytest

from mmman.experimental.scaling import Link
from mmman.experimental.scaling.machine import MachineTimes, compare
from tests.unit.tools.analysis_tools.test_simulate_scaling import profile


def test_predicted_beside_measured():
    link = Link(1e9)
    took = {'e2e': 0.2, 'local': 0.21, 'e2e ddp': 0.5, 'stock ddp': 0.6, 'blockwise ddp': 0.7, 'pipeline': 0.3}
    rows = {row.system: row for row in compare(MachineTimes(profile(2), profile(2, 0.2), link, link, took, [0.1, 0.3]))}
    assert rows['E2E'].predicted == pytest.approx(0.2) and rows['E2E'].measured == 0.2
    assert rows['MAN++, stock DDP'].predicted > rows['MAN++, block-wise DDP'].predicted >= 0.4
    assert rows['MAN++, pipeline 1x2'].predicted == pytest.approx(0.2, rel=0.01)
    assert rows['MAN++, pipeline 1x2'].measured == 0.3
    assert rows["MAN++, pipeline 1x2, from its stages' times"].predicted == pytest.approx(0.3, rel=0.01)
