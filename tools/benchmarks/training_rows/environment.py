"""What a result depends on beside its config: commit, versions, hardware."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain', 'mmman')


@cache
def commit() -> str:
    """The commit of the project, ending in ``-dirty`` if tracked files were changed since; ``'unknown'`` without git."""
    git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or 'unknown'


def environment() -> dict:
    """Commit, versions, hardware and time of an attempt at a training."""
    return {
        'commit': commit(),
        'device': _device(),
        'versions': _versions(),
        'date': datetime.now().isoformat(timespec='minutes'),
    }


@cache
def _device() -> str:
    """Names of the GPUs, or of the CPU."""
    cpu = Path('/proc/cpuinfo')
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    names = names or re.findall(r'model name\s*: (.*)', cpu.read_text() if cpu.exists() else '')[:1] or [platform.machine()]
    return ', '.join(names)


@cache
def _versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
