"""Kill trainings at random moments, resume them, and compare where they end with a training that was never killed.

A small RetinaNet (MAN++, K=4) trains on generated shapes with random flips, two loader workers and a checkpoint every few
iterations, of which one is kept. SIGKILL goes to all its processes at once or, in distributed runs, at times to one rank. Some
moments are drawn from the whole life of the process; for the others a checkpoint write is waited for. A training that ends
before the wanted number of kills is followed by another one.

    python tools/benchmarks/kill_and_resume.py --modes single ddp --kills 17
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import mmman  # noqa: F401  lets torch.load read mmengine's checkpoints
from mmman.datasets import write_shapes_dataset
from mmman.runtime.atomic_files import UNFINISHED
from mmman.runtime.checkpoint_files import latest_checkpoint
from mmman.runtime.resume_record import RECORD

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / 'tools' / 'train.py'
CONFIG = ROOT / 'configs' / 'demo' / 'retinanet_r18_manpp_k2_shapes.py'
RANKS = {'single': 1, 'ddp': 2, 'pipeline': 2}
IMAGES, BATCH, SIZE, EPOCHS, INTERVAL = 24, 2, 64, 4, 3
TIMEOUT = 600  # seconds without an end after which a process is taken to hang
LAUNCHER_S = 30  # a launcher ends the other ranks; here after they had this time to notice by themselves


@dataclass
class Tally:
    """What happened in one mode."""

    kills: int = 0
    during_write: int = 0
    one_rank: int = 0
    unnoticed: int = 0
    before_checkpoint: int = 0
    resumes: int = 0
    mid_epoch: int = 0
    runs: int = 0
    equal: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    data = write_shapes_dataset(args.work_dir / 'data', train_images=IMAGES, val_images=2, size=SIZE)
    tallies = {}
    for mode in args.modes:
        tallies[mode] = run_mode(mode, args, options_of(data, args))
        (args.work_dir / 'table.md').write_text(table(tallies))
    print(table(tallies))
    if any(tally.failures or tally.equal < tally.runs for tally in tallies.values()):
        raise SystemExit('\n'.join(failure for tally in tallies.values() for failure in tally.failures) or 'runs differ')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--modes', nargs='+', choices=RANKS, default=['single', 'ddp'])
    parser.add_argument('--kills', type=int, default=17, help='kills in each mode')
    parser.add_argument('--write-share', type=float, default=0.4, help='share of kills that wait for a checkpoint write')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/kill_and_resume'))
    parser.add_argument('--launch', action='store_true', help='start every training as a user does, which takes longer')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments')
    parser.add_argument('--config', type=Path, default=CONFIG, help='a config of the shapes dataset')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='more overrides, for every mode')
    parser.add_argument(
        '--pipeline-options', nargs='+', default=['runner_type=mmman.PipelineRunner'], help='overrides in mode pipeline'
    )
    return parser.parse_args()


def options_of(data: Path, args: argparse.Namespace) -> list[str]:
    values = {
        'train_dataloader.batch_size': BATCH,
        'train_dataloader.num_workers': 2,
        'train_dataloader.persistent_workers': True,
        'train_dataloader.dataset.data_root': f'{data}/',
        'val_dataloader.dataset.data_root': f'{data}/',
        'val_evaluator.ann_file': data / 'annotations' / 'instances_val.json',
        'train_dataloader.dataset.pipeline.2.scale': f'({SIZE},{SIZE})',
        'train_cfg.max_epochs': EPOCHS,
        'train_cfg.val_interval': 1000,
        'default_hooks.logger.interval': 1,
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.interval': INTERVAL,
        'default_hooks.checkpoint.max_keep_ckpts': 1,
    }
    return [*(f'{key}={value}' for key, value in values.items()), *args.cfg_options]


def run_mode(mode: str, args: argparse.Namespace, options: list[str]) -> Tally:
    """Train once without a kill, then with kills until there are enough of them."""
    if mode == 'pipeline':
        options = [*options, *args.pipeline_options]
    folder = args.work_dir / mode
    shutil.rmtree(folder, ignore_errors=True)
    tally, began = Tally(), time.monotonic()
    print(f'{mode}: the run without a kill', flush=True)
    reference = folder / 'reference'
    if Training(mode, args.config, reference, options, [], args.launch).wait(TIMEOUT) != 0:
        tally.failures.append(f'{mode}: the run without a kill failed, see {reference}.log')
        return tally
    life = time.monotonic() - began
    began = time.monotonic()
    while tally.kills < args.kills and not tally.failures:
        tally.runs += 1
        killed = folder / f'killed_{tally.runs}'
        killed_run(mode, args, killed, options, life, tally, began)
        if not tally.failures:
            difference = first_difference(load(reference), load(killed))
            tally.equal += difference is None
            if difference:
                tally.failures.append(f'{mode}: {killed} differs from {reference} in {difference}')
            print(f'{mode}: run {tally.runs} {"differs in " + difference if difference else "is bitwise equal"}', flush=True)
    return tally


def killed_run(mode, args, folder: Path, options: list[str], life: float, tally: Tally, began: float) -> None:
    """Start, kill and resume one training until it ends."""
    resume: list[str] = []
    while True:
        training = Training(mode, args.config, folder, options, resume, args.launch)
        at_write = random.random() < args.write_share
        victim = kill_at_random(training, folder, life, at_write) if tally.kills < args.kills else None
        if victim is None:
            if training.wait(TIMEOUT) != 0:
                tally.failures.append(f'{mode}: a run failed by itself, see {folder}.log')
            return
        tally.kills += 1
        tally.one_rank += victim != 'all processes'
        tally.unnoticed += victim == 'a rank before its first heartbeat'
        in_write = any(folder.glob(f'*{UNFINISHED}'))
        tally.during_write += in_write
        checkpoint = latest_checkpoint(folder)
        where = 'before the first checkpoint'
        if checkpoint is None:
            tally.before_checkpoint += 1
        else:
            meta = torch.load(checkpoint, map_location='cpu')['meta']
            is_mid = 0 < meta[RECORD]['batch'] < IMAGES // BATCH // (1 if mode == 'pipeline' else RANKS[mode])
            tally.mid_epoch += is_mid
            where = f'resuming at iteration {meta["iter"]}{", mid-epoch" if is_mid else ""}'
        tally.resumes += checkpoint is not None
        left = (time.monotonic() - began) / tally.kills * (args.kills - tally.kills)
        note = ', during a write' if in_write else ''
        print(f'{mode}: kill {tally.kills}/{args.kills} of {victim}{note}; {where}; {left / 60:.0f} min left', flush=True)
        resume = ['--resume']


class Training:
    """A training in one or several processes.

    Its processes are forked from one that has the libraries loaded, because loading them takes longer than what is to be
    killed. No launcher ends the others when one is killed: they notice by themselves. ``--launch`` starts them as a user does.
    """

    def __init__(self, mode: str, config: Path, folder: Path, options: list[str], resume: list[str], launch: bool) -> None:
        distributed = ['--launcher', 'pytorch'] if RANKS[mode] > 1 and not launch else []  # else the launch script sets it
        arguments = [config, '--work-dir', folder, *distributed, *resume, '--cfg-options', *options]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.count = RANKS[mode]
        self._launcher: subprocess.Popen | None = None
        if launch:
            self._launcher = _launch(mode, [*map(str, arguments)], f'{folder}.log')
            return
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['mmdet.apis', 'mmman', __name__])
        port = str(free_port())
        self._ranks = []
        for rank in range(self.count):
            numbers = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': self.count, 'MASTER_PORT': port}
            variables = {'MASTER_ADDR': '127.0.0.1', **{name: str(number) for name, number in numbers.items()}}
            process = context.Process(target=_train, args=([*map(str, arguments)], f'{folder}.log', variables))
            process.start()
            self._ranks.append(process)

    def code(self) -> int | None:
        """The exit code once all processes have ended, 0 where all have succeeded."""
        if self._launcher is not None:
            return self._launcher.poll()
        codes = [process.exitcode for process in self._ranks]
        return None if None in codes else max(codes, key=abs)

    def wait(self, timeout: float) -> int:
        """Wait for the end; kill what hangs."""
        deadline = time.monotonic() + timeout
        while self.code() is None:
            if time.monotonic() > deadline:
                for pid in self.family():
                    kill(pid)
                return -1
            time.sleep(0.02)
        return self.code()

    def ranks(self) -> list[int]:
        """The processes that train."""
        if self._launcher is None:
            return [process.pid for process in self._ranks if process.is_alive()]
        pid = self._launcher.pid
        return [pid] if self.count == 1 else [child for child in descendants(pid) if parent(child) == pid]

    def family(self) -> list[int]:
        """All processes: launcher, ranks, loader workers."""
        roots = [self._launcher.pid] if self._launcher is not None else self.ranks()
        return [pid for root in roots for pid in (root, *descendants(root))]


def _launch(mode: str, arguments: list[str], log: str) -> subprocess.Popen:
    config, *rest = arguments
    if mode == 'single':
        command = [sys.executable, str(TRAIN), config, *rest]
    else:
        command = [str(ROOT / 'tools' / 'dist_train.sh'), config, str(RANKS[mode]), *rest]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    environment = {**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1', 'PORT': str(free_port()), 'PYTHONPATH': str(ROOT)}
    with open(log, 'ab') as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def _train(arguments: list[str], log: str, variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name='__main__')


def kill_at_random(training: Training, folder: Path, life: float, at_write: bool) -> str | None:
    """Kill a training at a random moment; None where it ended before.

    Args:
        training: The training.
        folder: Its work folder.
        life: What an uninterrupted training takes, in seconds.
        at_write: Wait, from the random moment on, for a checkpoint write.
    """
    moment = time.monotonic() + random.uniform(0, life if not at_write else life / 2)
    while time.monotonic() < moment or (at_write and not any(folder.glob(f'*{UNFINISHED}'))):
        if training.code() is not None:
            return None
        time.sleep(0.001 if time.monotonic() > moment else 0.02)
    family, ranks = training.family(), training.ranks()
    one_rank = training.count > 1 and len(ranks) == training.count and random.random() < 0.5
    for pid in [random.choice(ranks)] if one_rank else family:
        kill(pid)
    ended = training.wait(LAUNCHER_S if one_rank else TIMEOUT) != -1
    for pid in family:  # loader workers that outlive their rank for a moment
        kill(pid)
    if not one_rank:
        return 'all processes'
    return 'a rank' if ended else 'a rank before its first heartbeat'


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    except (OSError, ValueError):
        return None


def descendants(pid: int) -> list[int]:
    """All processes below one, by Linux's process table."""
    parents = {int(path.name): parent(int(path.name)) for path in Path('/proc').glob('[0-9]*')}
    found = [pid]
    for ancestor in found:
        found += [child for child, above in parents.items() if above == ancestor]
    return found[1:]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def load(folder: Path) -> dict:
    checkpoint = torch.load(latest_checkpoint(folder), map_location='cpu')
    meta = {name: checkpoint['meta'][name] for name in ('epoch', 'iter', 'seed')}
    return {**{name: checkpoint[name] for name in ('state_dict', 'optimizer', 'param_schedulers')}, 'meta': meta}


def first_difference(ours: object, theirs: object, path: str = '') -> str | None:
    """The path of the first value that isn't the same, tensors bit for bit; None where all are."""
    if type(ours) is not type(theirs):
        return path
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return None if same and ours.numpy().tobytes() == theirs.numpy().tobytes() else path
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return path
        pairs = [(ours[key], theirs[key], f'{path}.{key}') for key in ours]
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return path
        pairs = [(mine, other, f'{path}.{i}') for i, (mine, other) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else path
    return next((found for pair in pairs if (found := first_difference(*pair))), None)


def table(tallies: dict[str, Tally]) -> str:
    columns = ('mode', 'kills', 'of one rank alone', 'others ended as by a launcher', 'during a write', 'resumes')
    columns += ('of these mid-epoch', 'started anew', 'bitwise equal')
    rows = [' | '.join(columns), ' | '.join(['---'] * len(columns))]
    for mode, tally in tallies.items():
        rows.append(
            f'{mode} | {tally.kills} | {tally.one_rank} | {tally.unnoticed} | {tally.during_write} | {tally.resumes} | '
            f'{tally.mid_epoch} | {tally.before_checkpoint} | {tally.equal} of {tally.runs} runs'
        )
    return '\n'.join(f'| {row} |' for row in rows) + '\n'


if __name__ == '__main__':
    main()
