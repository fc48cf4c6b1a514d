"""What all tests share: where the data is, one thread, and no default scope left over from another test."""

import os
from pathlib import Path

if 'MMMAN_TEST_GPU' not in os.environ:  # before any library looks: the suite is the CPU's, tests/gpu is run by itself
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest
import torch
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get('MMMAN_TEST_DATA', ROOT.parent / 'shared' / 'data'))
"""Where real data is looked for."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_default_scope():
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def test_data() -> Path:
    """The folder of real data, for tests that need it."""
    if not TEST_DATA.is_dir():
        pytest.skip(f'no test data at {TEST_DATA}; MMMAN_TEST_DATA names the folder')
    return TEST_DATA
