"""Configs of this project by name, and the recorded hashes of the rows of the paper.

``tests/paper_rows.txt`` has the hash of every row's config, and the versions of the libraries whose configs the rows inherit.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from pprint import pformat

from mmengine.config import Config

from tools.benchmarks.training_rows.paper_rows import expand, paper_rows

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
FILE = Path(__file__).with_name('paper_rows.txt')
LIBRARIES = ('mmdet', 'mmsegmentation', 'mmpretrain')


def read_config(name: str) -> Config:
    """A config by its path below ``configs``, or a row of the paper by its name."""
    return expand(name) if name in paper_rows() else Config.fromfile(CONFIGS / name)


def digest(cfg: Config) -> str:
    """Hash of all settings of a config, whatever their order; lists and tuples differ."""
    return hashlib.sha256(pformat(cfg.to_dict(), width=10**6).encode()).hexdigest()[:32]


def versions() -> str:
    return ', '.join(f'{name} {version(name)}' for name in LIBRARIES)


def recorded() -> tuple[str, dict[str, str]]:
    """The versions that the hashes were recorded with, and the hash of every row by its name."""
    first, *lines = FILE.read_text().splitlines()
    return first.removeprefix('# '), {name: value for value, name in (line.split() for line in lines)}
