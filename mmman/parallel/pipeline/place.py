"""Where a process stands in a mesh of stages and replicas, and how it reaches the others."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.device import get_device
from torch.distributed import PrefixStore, Store

from mmman.errors import MisuseError
from mmman.watchdog.rendezvous import RANK_VARIABLES, connect, find_rank

PATIENT = timedelta(days=365)
"""For waits that the watchdog ends where nothing will come."""


@dataclass(frozen=True)
class Place:
    """Stage ``stage`` of ``stages`` (K) in replica ``replica`` of ``replicas`` (D), both from 0.

    The K stages of a replica have consecutive ranks: features travel between neighbours, within a machine where K fits it.
    """

    stage: int
    stages: int
    replica: int
    replicas: int

    @classmethod
    def of_rank(cls, rank: int, world_size: int, stages: int) -> Place:
        """Raises :class:`MisuseError` where the processes can't be shared out among ``stages`` stages."""
        if world_size % stages:
            raise MisuseError(
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

    def at(self, rank: int) -> Place:
        """The place of another rank of the same mesh."""
        return Place.of_rank(rank, self.world_size, self.stages)

    def __str__(self) -> str:
        replica = f' of replica {self.replica}' if self.replicas > 1 else ''
        return f'stage {self.stage}{replica} (rank {self.rank})'


def rendezvous(launcher: str, stages: int, environment: MutableMapping[str, str] = os.environ) -> tuple[Place, Store]:
    """Meet the other processes of a job.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``; it has told each process its rank in the environment.
        stages: K.

    Returns:
        This process's place, and a store that all share.

    Raises:
        MisuseError: There is no launcher, or its variables are missing, or the number of processes isn't a multiple of K.
    """
    if launcher not in RANK_VARIABLES:
        raise MisuseError(f'a pipeline of {stages} stages runs in {stages} processes: tools/dist_train.sh CONFIG {stages}')
    rank, world_size = find_rank(launcher, environment)
    place = Place.of_rank(rank, world_size, stages)
    return place, PrefixStore('mmman/pipeline', connect(rank, world_size))


def join_replicas(place: Place, store: Store) -> None:
    """Take this process's GPU, and make the replicas of this stage the default process group, where there are several.

    To the libraries a stage then is an ordinary run of D processes: samplers, evaluators, ``reduce_mean`` and SyncBN see its
    replicas and nothing of the pipeline.
    """
    if get_device() == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    if place.replicas > 1:
        dist.init_process_group(
            'nccl' if get_device() == 'cuda' else 'gloo',
            store=PrefixStore(f'stage{place.stage}', store),
            rank=place.replica,
            world_size=place.replicas,
        )


def stage_groups(place: Place, store: Store, direction: str) -> dict[str, dist.ProcessGroup]:
    """The process groups of a replica's stages for messages of one direction, by the type of device whose tensors they carry.

    One communicator a direction: what a stage sends forward never queues behind what it waits for from the next one.
    """
    name = f'replica{place.replica}/{direction}'
    groups = {'cpu': dist.ProcessGroupGloo(PrefixStore(f'{name}/cpu', store), place.stage, place.stages, PATIENT)}
    if get_device() == 'cuda':
        groups['cuda'] = dist.ProcessGroupNCCL(PrefixStore(f'{name}/cuda', store), place.stage, place.stages, PATIENT)
    return groups
