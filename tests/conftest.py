"""What all tests share: where the data is, one thread, and no default scope left over from another test."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_default_scope():
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def test_data() -> Path:
    """The folder of real data: ``MMMAN_TEST_DATA``, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get('MMMAN_TEST_DATA', ROOT.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'no test data at {folder}; MMMAN_TEST_DATA names the folder')
    return folder
