"""Compare the simulator's predictions with real training in two processes on this machine."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import multiprocessing

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.engine import LocalLearningOptimWrapper
from mmman.experimental.scaling.measure import EMA_MOMENTUM, WARMUP, ProfileMeter, optimizer_like, single_block_copy
from mmman.experimental.scaling.network import Link, Network
from mmman.experimental.scaling.pipeline_run import pipeline_seconds
from mmman.experimental.scaling.profile import BlockCost, StageProfile
from mmman.experimental.scaling.simulate import BUCKET, simulate_end_to_end, simulate_local, simulate_pipeline
from mmman.local import delocalize_
from mmman.parallel.ddp import LocalDistributedDataParallel

PROCESSES = 2
LARGE = 16 * 2**20
"""Bytes of a message so large that its latency is negligible."""


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured seconds per iteration."""

    system: str
    processes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class MachineTimes:
    """Measurements of two processes on this machine, each with one thread.

    Attributes:
        alone: Profile of one process while the other one is idle.
        beside: Profile of one process while the other one measures its own profile.
        point_to_point: The link, measured by sending messages back and forth.
        ring: The link, measured by an all-reduce of one of DDP's buckets.
        iterations: Seconds per iteration of each system: medians, and for the pipeline the mean.
        stages: Mean seconds per iteration in which each stage computed, measured in the timed run of the pipeline. None if
            the pipeline wasn't run.
    """

    alone: StageProfile
    beside: StageProfile
    point_to_point: Link
    ring: Link
    iterations: dict[str, float]
    stages: list[float] | None = None


def check_machine(cfg: Config, batch: int, height: int, width: int, iterations: int) -> tuple[MachineTimes, list[Comparison]]:
    """Train a localised config in one and in two gloo processes on this CPU, and compare with the simulator.

    Args:
        cfg: Config whose model and optim wrapper are used. The images are random.
        batch: Images per process.
        height, width: Size of the images, pixels.
        iterations: Number of timed steps of each kind; the pipeline takes four times as many.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (folder, cfg, batch, height, width, iterations), nprocs=PROCESSES)
        found = json.loads(Path(folder, 'measured.json').read_text())
    if len(found['beside']['blocks']) == PROCESSES:
        seconds, found['stages'] = pipeline_seconds(cfg, PROCESSES, batch, height, width, 4 * iterations)
        found['iterations']['pipeline'] = seconds
    measured = MachineTimes(
        alone=StageProfile.from_dict(found['alone']),
        beside=StageProfile.from_dict(found['beside']),
        point_to_point=Link(**found['point_to_point']),
        ring=Link(**found['ring']),
        iterations=found['iterations'],
        stages=found.get('stages'),
    )
    return measured, compare(measured)


def compare(measured: MachineTimes) -> list[Comparison]:
    """Compare simulated with measured iterations. A pipeline is included if it was measured."""
    ring, took = Network(measured.ring), measured.iterations
    alone, beside = measured.alone, measured.beside
    one, two = simulate_end_to_end(alone, 1, ring), simulate_end_to_end(beside, PROCESSES, ring)
    local, stock = simulate_local(alone, 1, ring, False), simulate_local(beside, PROCESSES, ring, False)
    blockwise = simulate_local(beside, PROCESSES, ring, True)
    rows = [
        Comparison('E2E', 1, one.iteration, took['e2e']),
        Comparison('MAN++', 1, local.iteration, took['local']),
        Comparison(two.system, PROCESSES, two.iteration, took['e2e ddp']),
        Comparison(stock.system, PROCESSES, stock.iteration, took['stock ddp']),
        Comparison(blockwise.system, PROCESSES, blockwise.iteration, took['blockwise ddp']),
    ]
    if 'pipeline' in took:
        link = Network(measured.point_to_point)
        pipeline = simulate_pipeline(beside, PROCESSES, link)
        rows.append(Comparison(pipeline.system, PROCESSES, pipeline.iteration, took['pipeline']))
        blocks = tuple(_with_seconds(block, seconds) for block, seconds in zip(beside.blocks, measured.stages, strict=True))
        pipeline = simulate_pipeline(replace(beside, blocks=blocks), PROCESSES, link)
        rows.append(Comparison(f"{pipeline.system}, from its stages' times", PROCESSES, pipeline.iteration, took['pipeline']))
    return rows


def _with_seconds(block: BlockCost, seconds: float) -> BlockCost:
    """Scale the times of a block so that they take ``seconds`` together."""
    parts = ('forward', 'head', 'backward', 'update')
    return replace(block, **{name: getattr(block, name) * seconds / block.seconds for name in parts})


def _process(rank: int, folder: str, cfg: Config, batch: int, height: int, width: int, iterations: int) -> None:
    """Run the measurements in one of the processes. Rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=PROCESSES)
    links = {'point_to_point': asdict(_point_to_point(rank)), 'ring': asdict(_ring())}
    model, optim_wrapper = build_dummy_model(cfg, height, width)
    data = random_batch(model, cfg.default_scope, batch, height, width, seed=rank)
    found = {}
    if rank == 0:
        alone = ProfileMeter(model, optim_wrapper, data)
        steps = {'e2e': _end_to_end_step(alone), 'local': _local_step(alone)}
        took = _medians({'profile': alone.lap, **steps}, iterations)
        found = {'alone': asdict(alone.profile()), **links}
    dist.barrier()
    options = {'broadcast_buffers': False, 'device_ids': None}
    beside = ProfileMeter(model, optim_wrapper, data)
    replicated = {
        'e2e ddp': _end_to_end_step(beside, partial(MMDistributedDataParallel, **options)),
        'stock ddp': _local_step(beside, partial(MMDistributedDataParallel, find_unused_parameters=True, **options)),
        'blockwise ddp': _local_step(beside, partial(LocalDistributedDataParallel, **options)),
    }
    both = _medians({'profile': beside.lap, **replicated}, iterations, dist.barrier)
    if rank == 0:
        found |= {'beside': asdict(beside.profile()), 'iterations': {**took, **both}}
        Path(folder, 'measured.json').write_text(json.dumps(found))
    dist.destroy_process_group()


def _end_to_end_step(meter: ProfileMeter, wrap: Callable = lambda model: model) -> Callable[[], None]:
    """Return a function that takes an end-to-end step on a copy of the meter's model, with mmengine's optim wrapper."""
    model, optim_wrapper = single_block_copy(meter.model, meter.optim_wrapper)
    delocalize_(model.backbone)
    wrapped, optim_wrapper = wrap(model), OptimWrapper(optim_wrapper.optimizer)
    return lambda: wrapped.train_step(meter.data, optim_wrapper)


def _local_step(meter: ProfileMeter, wrap: Callable = lambda model: model) -> Callable[[], None]:
    """Return a function that takes a local step on a copy of the meter's model."""
    model = copy.deepcopy(meter.model)
    wrapped = wrap(model)
    optim_wrapper = LocalLearningOptimWrapper(optimizer_like(meter.optim_wrapper.optimizer, model))

    def step() -> None:
        wrapped.train_step(meter.data, optim_wrapper)
        for head in model.backbone.local.values():
            head.transfer.ema_update_(head.source.of(model.backbone), EMA_MOMENTUM)

    return step


def _medians(steps: dict[str, Callable], iterations: int, meet: Callable = lambda: None) -> dict[str, float]:
    """Median seconds of each step. The steps take turns; ``meet`` is called before each, to synchronise the processes."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARMUP + iterations):
        for name, step in steps.items():
            meet()
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(own[WARMUP:]) for name, own in times.items()}


def _point_to_point(rank: int) -> Link:
    """Measure half a round trip: of a 1-byte message for the latency, of a large message for the bandwidth."""

    def one_way(size: int, rounds: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8)

        def there_and_back() -> None:
            for sender in range(PROCESSES):
                if rank == sender:
                    dist.send(message, 1 - rank)
                else:
                    dist.recv(message, 1 - rank)

        return _medians({'both': there_and_back}, rounds)['both'] / 2

    latency = one_way(1, 100)
    return Link(LARGE / max(one_way(LARGE, 9) - latency, 1e-9), latency)


def _ring() -> Link:
    small, large = torch.zeros(1), torch.zeros(BUCKET // 4)
    steps = {'fixed': lambda: dist.all_reduce(small), 'whole': lambda: dist.all_reduce(large)}
    fixed, whole = _medians(steps, 15, dist.barrier).values()
    rounds = 2 * (PROCESSES - 1)
    return Link(rounds * BUCKET / PROCESSES / max(whole - fixed, 1e-9), fixed / rounds)
