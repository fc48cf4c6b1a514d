"""What all tests share: where the data is, one thread, bounded memory, and no default scope left over from another test."""

import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

if 'MMMAN_TEST_GPU' not in os.environ:  # before any library looks: the suite is the CPU's, tests/gpu is run by itself
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest
import torch
from mmengine.config import Config, utils
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get('MMMAN_TEST_DATA', ROOT.parent / 'shared' / 'data'))
"""Where real data is looked for."""

GROWTH = 400 << 20
"""Bytes that a worker may grow by before garbage is collected."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def resident_bytes() -> int:
    """Physical memory of this process."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(scope='session')
def baseline() -> list[int]:
    """Resident bytes after the last collection."""
    return [0]


@pytest.fixture(autouse=True)
def bounded_memory(baseline: list[int]) -> Iterator[None]:
    """Give back what tests leave behind.

    Models are cyclic (modules hold hooks that hold modules), and Python's collector counts objects, not the gigabytes that
    their tensors take; the C library keeps what is freed in small pieces. A worker grows past the machine's memory without it.
    """
    yield
    if sys.platform == 'linux' and resident_bytes() > baseline[0] + GROWTH:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        baseline[0] = resident_bytes()


@pytest.fixture(autouse=True)
def no_default_scope():
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session', autouse=True)
def cached_library_configs() -> Iterator[None]:
    """Find a library's config once: for every ``mmpretrain::``, mmengine parses the metafiles of the whole library."""
    find = functools.cache(Config._get_cfg_path)

    def find_once(cfg_path: str, filename: str) -> tuple[str, str | None]:
        return find(cfg_path, '' if '::' in cfg_path else filename)

    with patch.object(Config, '_get_cfg_path', find_once), patch.object(utils, 'load', functools.cache(utils.load)):
        yield


@pytest.fixture(scope='session')
def test_data() -> Path:
    """The folder of real data, for tests that need it."""
    if not TEST_DATA.is_dir():
        pytest.skip(f'no test data at {TEST_DATA}; MMMAN_TEST_DATA names the folder')
    return TEST_DATA
