"""What a process reads of its launcher, and the store that it connects to."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmman.errors import ConfigError
from mmman.parallel.pipeline.stage_rank import rendezvous
from mmman.watchdog.rendezvous import connect, find_rank
from tests.parity.pipeline_runs import free_port


def test_slurm_names_the_first_machine(tmp_path, monkeypatch):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\necho "$3" | grep -q "127.0.0.1" && printf "127.0.0.1\nb\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    job = {'SLURM_PROCID': '0', 'SLURM_NTASKS': '1', 'SLURM_NODELIST': '127.0.0.1,b', 'MASTER_PORT': str(free_port())}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('MASTER_ADDR', '')  # so that it is taken back after the test
    monkeypatch.delenv('MASTER_ADDR')
    stage_rank, _ = rendezvous('slurm', 1)
    assert (stage_rank.rank, os.environ['MASTER_ADDR']) == (0, '127.0.0.1')


@pytest.mark.parametrize(
    ('launcher', 'variables'),
    [
        ('pytorch', {'RANK': '3', 'WORLD_SIZE': '8'}),
        ('slurm', {'SLURM_PROCID': '3', 'SLURM_NTASKS': '8'}),
        ('mpi', {'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_SIZE': '8'}),
    ],
)
def test_the_rank_is_the_launchers(launcher, variables):
    environment = {'MASTER_ADDR': 'a', **variables}
    assert find_rank(launcher, environment) == (3, 8)
    assert (environment['MASTER_ADDR'], environment['MASTER_PORT']) == ('a', '29500')
    environment['MASTER_PORT'] = '7'
    find_rank(launcher, environment)
    assert environment['MASTER_PORT'] == '7'


@pytest.mark.parametrize(
    ('variables', 'missing'),
    [({}, 'RANK'), ({'RANK': '0'}, 'WORLD_SIZE'), ({'RANK': '0', 'WORLD_SIZE': '1'}, 'MASTER_ADDR')],
)
def test_a_missing_variable_is_named(variables, missing):
    with pytest.raises(ConfigError, match=f"--launcher pytorch: '{missing}' is not set; start the program with that launcher"):
        find_rank('pytorch', variables)


def test_every_connection_is_to_the_same_store(monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', str(free_port()))
    with ThreadPoolExecutor() as pool:  # both wait for each other
        host, other = pool.map(connect, (0, 1), (2, 2))
    host.set('key', 'value')
    assert other.get('key') == b'value'
