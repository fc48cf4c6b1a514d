"""Work folders of trained toy networks, which the analysis tools read."""

from pathlib import Path

import pytest

from tests.trained import train


@pytest.fixture(scope='session')
def manpp(tmp_path_factory) -> Path:
    """A run with four blocks and the inspector."""
    return train(tmp_path_factory.mktemp('runs') / 'manpp')


@pytest.fixture(scope='session')
def e2e(tmp_path_factory) -> Path:
    """A run with one block."""
    return train(tmp_path_factory.mktemp('runs') / 'e2e', hook=False, num_blocks=1)
