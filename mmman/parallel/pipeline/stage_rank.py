"""Position of a process in the mesh of stages and replicas, and the process groups that connect it with the others."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.device import get_device
from torch.distributed import PrefixStore, Store

from mmman.errors import ConfigError
from mmman.watchdog.rendezvous import RANK_VARIABLES, connect, find_rank

NO_TIMEOUT = timedelta(days=365)
"""Effectively no timeout (a year), for blocking calls that the watchdog interrupts if another process has failed."""


@dataclass(frozen=True)
class StageRank:
    """Position of a process: stage ``stage`` of ``stages`` (K) in replica ``replica`` of ``replicas`` (D), both from 0.

    The K stages of a replica have consecutive ranks. Features stay within a machine if it runs a multiple
    of K processes.
    """

    stage: int
    stages: int
    replica: int
    replicas: int

    @classmethod
    def from_rank(cls, rank: int, world_size: int, stages: int) -> StageRank:
        """The position of global rank ``rank``.

        Raises:
            ConfigError: ``world_size`` is not a multiple of ``stages``.
        """
        if world_size % stages:
            raise ConfigError(
                f'{world_size} processes cannot hold replicas of {stages} stages: start {stages} processes, or a multiple'
            )
        return cls(rank % stages, stages, rank // stages, world_size // stages)

    @property
    def rank(self) -> int:
        return self.replica * self.stages + self.stage

    @property
    def world_size(self) -> int:
        return self.replicas * self.stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def at(self, rank: int) -> StageRank:
        """The position of another global rank in the same mesh."""
        return StageRank.from_rank(rank, self.world_size, self.stages)

    def __str__(self) -> str:
        replica = f' of replica {self.replica}' if self.replicas > 1 else ''
        return f'stage {self.stage}{replica} (rank {self.rank})'


def rendezvous(launcher: str, stages: int, environment: MutableMapping[str, str] = os.environ) -> tuple[StageRank, Store]:
    """Join the other processes of a job.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``. It sets the rank of each process in the environment.
        stages: K, the number of stages.
        environment: The environment variables to read. ``MASTER_ADDR`` and ``MASTER_PORT`` are set if missing.

    Returns:
        The position of this process, and the store that all processes share.

    Raises:
        ConfigError: There is no launcher, its variables are missing, or the number of processes is not a multiple of K.
    """
    if launcher not in RANK_VARIABLES:
        raise ConfigError(f'a pipeline of {stages} stages runs in {stages} processes: tools/dist_train.sh CONFIG {stages}')
    rank, world_size = find_rank(launcher, environment)
    stage_rank = StageRank.from_rank(rank, world_size, stages)
    return stage_rank, PrefixStore('mmman/pipeline', connect(rank, world_size))


def join_replicas(stage_rank: StageRank, store: Store) -> None:
    """Select this process's GPU. If D > 1, create the default process group from the D replicas of this stage.

    For the libraries a stage is then an ordinary run of D processes: samplers, evaluators, ``reduce_mean`` and SyncBN see its
    replicas only, not the other stages.
    """
    if get_device() == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    if stage_rank.replicas > 1:
        dist.init_process_group(
            'nccl' if get_device() == 'cuda' else 'gloo',
            store=PrefixStore(f'stage{stage_rank.stage}', store),
            rank=stage_rank.replica,
            world_size=stage_rank.replicas,
        )


def stage_groups(stage_rank: StageRank, store: Store, direction: str) -> dict[str, dist.ProcessGroup]:
    """Create the process groups of a replica's stages for messages in one direction (``'forward'`` or ``'back'``).

    Each direction has its own communicator, so that a forward send never queues behind a pending receive from the next stage.

    Returns:
        The process groups by the device type of the tensors that they carry: ``'cpu'``, and on GPUs also ``'cuda'``.
    """
    name = f'replica{stage_rank.replica}/{direction}'
    groups = {'cpu': dist.ProcessGroupGloo(PrefixStore(f'{name}/cpu', store), stage_rank.stage, stage_rank.stages, NO_TIMEOUT)}
    if get_device() == 'cuda':
        groups['cuda'] = dist.ProcessGroupNCCL(
            PrefixStore(f'{name}/cuda', store), stage_rank.stage, stage_rank.stages, NO_TIMEOUT
        )
    return groups
