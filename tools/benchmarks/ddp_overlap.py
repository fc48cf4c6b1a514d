"""Time per iteration of data parallel wrappers: ours, stock DDP, and gradients that aren't reduced at all.

    python tools/benchmarks/ddp_overlap.py configs/resnet32_manpp_k16_cifar10.py --shape 32 32 --batch 16 --bandwidth 20MB/s

Every round runs one training step of each wrapper on the same random batch, in changing order, so that what else the machine
does falls on all of them. Ratios are taken within a round; the table has their median and quartiles.

``--bandwidth`` stands for a slower network: a bucket counts as reduced when a ring all-reduce over links of that bandwidth
would be done, one bucket after the other. Waiting takes no core, as with real network cards. Without it, what is measured is
the real group on this machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.model import MMDistributedDataParallel
from torch import multiprocessing
from torch.futures import Future

from mmman import LocalDistributedDataParallel
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.experimental.scaling.network import parse_bandwidth
from mmman.runtime.launch import config_argument

WRAPPERS = {
    'ours': lambda model: LocalDistributedDataParallel(model, broadcast_buffers=False),
    'stock': lambda model: MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True),
    'unreduced': lambda model: LocalDistributedDataParallel(model, broadcast_buffers=False),
}


class SlowLink:
    """A link that carries one bucket after the other at a given bandwidth, beside the real all-reduce.

    Args:
        bandwidth: Bytes a second of every link of the ring.
    """

    def __init__(self, bandwidth: float) -> None:
        self.seconds_per_byte = 2 * (dist.get_world_size() - 1) / dist.get_world_size() / bandwidth
        self.free_at = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1)

    def all_reduce(self, state: None, bucket: dist.GradBucket) -> Future[torch.Tensor]:
        """A communication hook of DDP's."""
        buffer = bucket.buffer().div_(dist.get_world_size())
        reduced = dist.all_reduce(buffer, async_op=True).get_future()
        self.free_at = max(time.perf_counter(), self.free_at) + buffer.nbytes * self.seconds_per_byte
        carried = Future()
        self.thread.submit(self._carry, reduced, self.free_at, buffer, carried)
        return carried

    @staticmethod
    def _carry(reduced: Future, end: float, buffer: torch.Tensor, carried: Future) -> None:
        reduced.wait()
        time.sleep(max(0.0, end - time.perf_counter()))
        carried.set_result(buffer)


def step_of(kind: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A training step under one of the wrappers."""
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.optim_wrapper.pop('loss_scale', None)
    model, optim_wrapper = build_dummy_model(cfg, *args.shape)
    wrapped = WRAPPERS[kind](model.to(device))
    if args.bandwidth:
        wrapped.register_comm_hook(None, SlowLink(args.bandwidth).all_reduce)
    batch = random_batch(model, cfg.default_scope, args.batch, *args.shape, seed=dist.get_rank())

    def step() -> None:
        with wrapped.no_sync() if kind == 'unreduced' else nullcontext():
            wrapped.train_step(dict(batch), optim_wrapper)
        if device.type == 'cuda':
            torch.cuda.synchronize()

    return step


def measure(rank: int, args: argparse.Namespace) -> None:
    """What one process does; the first one prints the table."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'tcp://127.0.0.1:{args.port}', rank=rank, world_size=args.ranks)
    steps = {kind: step_of(kind, args, device) for kind in WRAPPERS}
    rounds = []
    for i in range(args.warmup + args.rounds):
        seconds = {}
        order = [*steps][i % len(steps) :] + [*steps][: i % len(steps)]
        for kind in order:
            dist.barrier()
            start = time.perf_counter()
            steps[kind]()
            dist.barrier()
            seconds[kind] = time.perf_counter() - start
        rounds.append(seconds)
    if rank == 0:
        print_table(rounds[args.warmup :])
    dist.destroy_process_group()


def print_table(rounds: list[dict[str, float]]) -> None:
    print('| | median | quartiles |\n|---|---|---|')
    for kind in WRAPPERS:
        print(row(f'{kind}, s', [seconds[kind] for seconds in rounds]))
    for a, b in (('ours', 'stock'), ('ours', 'unreduced'), ('stock', 'unreduced')):
        print(row(f'{a} / {b}', [seconds[a] / seconds[b] for seconds in rounds]))


def row(name: str, values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f'| {name} | {median:.3f} | {low:.3f} to {high:.3f} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=config_argument, help='a config with local learning')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'), help='pixels of an image')
    parser.add_argument('--batch', type=int, default=2, help='images a process')
    parser.add_argument('--ranks', type=int, default=2, help='processes')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='cuda: one process, on one GPU')
    parser.add_argument('--bandwidth', type=parse_bandwidth, help="of a simulated link, e.g. '20MB/s'; on the CPU")
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--warmup', type=int, default=3, help='rounds before that; buckets are rebuilt in the second')
    parser.add_argument('--threads', type=int, default=1, help='of a process')
    parser.add_argument('--port', type=int, default=29517)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings of the config'
    )
    args = parser.parse_args()
    if args.rounds < 1:
        raise SystemExit(f'--rounds {args.rounds}: give at least 1')
    if args.device == 'cuda' and (args.ranks > 1 or args.bandwidth):
        raise SystemExit('--device cuda: NCCL takes one process a GPU, set --ranks 1 and leave --bandwidth out')
    os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
    multiprocessing.spawn(measure, (args,), nprocs=args.ranks)


if __name__ == '__main__':
    main()
