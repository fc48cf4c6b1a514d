"""Positions in the mesh of stages and replicas, and what a launcher must have set."""

import pytest

from mmman.errors import ConfigError
from mmman.parallel.pipeline.stage_rank import StageRank, rendezvous
from tests.parity.pipeline_runs import environment


def test_stage_ranks_of_a_mesh():
    mesh = [StageRank.from_rank(rank, 6, 3) for rank in range(6)]
    assert [(stage_rank.stage, stage_rank.replica) for stage_rank in mesh] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [stage_rank.rank for stage_rank in mesh] == list(range(6))
    assert str(mesh[4]) == 'stage 1 of replica 1 (rank 4)'
    with pytest.raises(ConfigError, match='start 4 processes, or a multiple'):
        StageRank.from_rank(0, 6, 4)


@pytest.mark.parametrize(
    ('launcher', 'variables', 'message'),
    [
        ('none', {}, r'tools/dist_train.sh CONFIG 4'),
        ('pytorch', {}, "'RANK' is not set; start the program with that launcher"),
        ('pytorch', environment(0, 3, 0), '3 processes cannot hold replicas of 4 stages'),
    ],
)
def test_rendezvous_refuses(launcher, variables, message):
    with pytest.raises(ConfigError, match=message):
        rendezvous(launcher, 4, variables)
