"""The parts of the pipeline one by one: stage ranks, channels, the watchdog, and what is refused."""

import os
import time
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS

from mmman.errors import ConfigError, PeerError
from mmman.parallel.pipeline.channel import Receiver, Sender
from mmman.parallel.pipeline.runner import PipelineRunner
from mmman.parallel.pipeline.shard import StageShard
from mmman.parallel.pipeline.stage_rank import StageRank, rendezvous
from mmman.watchdog import monitor as watchdog_module
from mmman.watchdog.monitor import Watchdog
from tests.parity.pipeline_runs import environment, free_port, toy_run
from tests.toy import toy_config


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


def test_a_shard_is_filled_and_emptied():
    whole = MODELS.build(toy_config(num_blocks=2))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    shard = StageShard(whole, 1)
    shard.split_(torch.optim.SGD(whole.parameters(), lr=0.1), 'cpu')
    held = {name for name, value in whole.state_dict().items() if not value.is_meta}
    assert held == shard.weights().keys() != state.keys()
    with pytest.raises(ConfigError, match='no stage holds backbone'):
        shard.fill_({})
    shard.fill_(state)
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    shard.empty_()
    assert {name for name, value in whole.state_dict().items() if not value.is_meta} == held


class Loopback:
    """A process group whose two members are one: what is sent is what is received."""

    def __init__(self):
        self.sent = Queue()
        self.bytes = 0

    def send(self, tensors, peer, tag):
        self.sent.put(tensors[0].clone())
        self.bytes += tensors[0].nbytes
        return SimpleNamespace(wait=lambda timeout: None)

    def recv(self, tensors, peer, tag):
        return SimpleNamespace(wait=lambda timeout: tensors[0].copy_(self.sent.get()))


@pytest.fixture
def ends():
    group = Loopback()
    sender, receiver = Sender({'cpu': group}, 1, limit=2), Receiver({'cpu': group}, 0, limit=2, check=lambda: None)
    yield sender, receiver
    sender.close()
    receiver.join()


def test_messages_arrive_as_they_were_sent(ends):
    sender, receiver = ends
    tokens = torch.randn(20, 50, 7).transpose(1, 2)  # dense, but not in C order
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    message = {
        'tokens': tokens,
        'again': [tokens],
        'channels_last': channels_last,
        'strided': torch.arange(10)[::3],
        'none': torch.zeros(0, 4),
        'flags': torch.tensor([True, False]),
        'half': torch.randn(3).to(torch.bfloat16),
        'scalar': torch.tensor(3.0),
        'shape only': torch.empty(2, 3, device='meta'),
        'text': 'abc',
    }
    sender.send(message)
    received = receiver.recv()
    assert sender._groups['cpu'].bytes < tokens.nbytes + channels_last.nbytes + 2000  # a tensor that occurs twice is sent once
    assert received['shape only'].is_meta
    assert received['tokens'] is received['again'][0]
    for name, value in message.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert torch.equal(received[name], value), name
            assert received[name].dtype == value.dtype
    assert received['tokens'].stride() == tokens.stride()
    assert received['channels_last'].stride() == channels_last.stride()
    assert received['text'] == 'abc'


def test_messages_keep_their_order(ends):
    sender, receiver = ends
    for i in range(6):
        sender.send((i, torch.full((1000,), i)))
    for i in range(6):
        number, tensor = receiver.recv()
        assert number == i
        assert tensor.unique().item() == i


def watched(ranks, timeout):
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    name = [str(StageRank.from_rank(rank, ranks, ranks)) for rank in range(ranks)].__getitem__
    return [Watchdog(rank, ranks, store, timeout, name) for rank in range(ranks)]


def failure_of(watchdog, seconds=5):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watchdog.check()
        time.sleep(0.05)


def test_a_silent_process_is_noticed():
    first, _ = watched(2, timeout=0.4)
    first.start()
    with pytest.raises(PeerError, match=r'stage 1 \(rank 1\): no heartbeat for 0.4 s'):
        failure_of(first)
    first._stop.set()


def test_an_error_is_told_to_all(monkeypatch):
    monkeypatch.setattr(watchdog_module.atexit, 'register', lambda *args: None)
    first, second = watched(2, timeout=2)
    first.start()
    second.start()

    def fail():
        with second.reporting():
            raise ValueError('no such thing')

    with pytest.raises(ValueError, match='no such thing'):
        fail()
    with pytest.raises(PeerError, match=r'stage 1 \(rank 1\): ValueError: no such thing'):
        failure_of(first)
    first._stop.set()


def test_who_leaves_in_order_is_not_missed():
    first, second = watched(2, timeout=0.4)
    first.start()
    second.start()
    second.leave()
    failure_of(first, seconds=1)
    first.leave()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pipeline': {'queue': 3}}, 'PipelineOptions has no option queue; the options are staleness, timeout'),
        ({'pipeline': {'staleness': -1}}, 'pipeline.staleness=-1: expected an integer >= 0'),
        ({'model': {'type': 'ToyClassifier', 'backbone': {'type': 'ToyNet'}}}, 'trains the blocks of a localised model'),
        ({'custom_hooks': [{'type': 'EMAHook'}]}, 'EMAHook averages a whole model'),
        ({'optim_wrapper.clip_grad': {'max_norm': 1}, 'optim_wrapper.clip_scope': 'global'}, 'needs all gradients at once'),
        ({'optim_wrapper.loss_scale': 'dynamic', 'optim_wrapper.dtype': 'bfloat16'}, 'which steps to skip'),
    ],
)
def test_what_stages_cannot_do_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module.atexit, 'register', lambda *args: None)
    cfg = toy_run(tmp_path, model={'num_blocks': 1})  # one stage: one process is a whole pipeline
    cfg.merge_from_dict({key: value for key, value in options.items() if key != 'model'})
    cfg.model = options.get('model', cfg.model)
    cfg.launcher = 'pytorch'
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        PipelineRunner.from_cfg(cfg).train()
