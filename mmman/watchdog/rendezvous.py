"""Reads a process's rank from its launcher's environment, and connects to the store that all processes of a job share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

from mmman.errors import ConfigError

# Environment variables of each launcher: rank, number of processes, and rank on this machine.
RANK_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def find_rank(launcher: str, environment: MutableMapping[str, str] = os.environ) -> tuple[int, int]:
    """Read this process's rank and the number of processes. Sets ``MASTER_ADDR`` and ``MASTER_PORT`` if they are missing.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        environment: The environment variables.

    Returns:
        The rank and the number of processes.

    Raises:
        ConfigError: The launcher's variables are missing.
    """
    try:
        rank, world_size = (int(environment[name]) for name in RANK_VARIABLES[launcher][:2])
        address = environment.get('MASTER_ADDR')
        if address is None:
            address = _first_host(environment['SLURM_NODELIST']) if launcher == 'slurm' else environment['MASTER_ADDR']
    except KeyError as error:
        raise ConfigError(f'--launcher {launcher}: {error} is not set; start the program with that launcher') from None
    environment['MASTER_ADDR'] = address
    environment.setdefault('MASTER_PORT', '29500')
    return rank, world_size


def connect(rank: int, world_size: int) -> Store:
    """Open a new connection to the store at ``MASTER_ADDR``, which the launcher or rank 0 hosts. Waits up to 30 minutes."""
    store, _, _ = next(dist.rendezvous('env://', rank, world_size, timeout=timedelta(minutes=30)))
    return store


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list, which may be abbreviated (``node[3-7]``)."""
    command = ['scontrol', 'show', 'hostnames', nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
