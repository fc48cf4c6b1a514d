"""Throughput of E2E and MAN++ under DDP and of MAN++ as a pipeline on N GPUs, before you have them.

    python tools/analysis_tools/simulate_scaling.py CONFIG --measure --batch 16 --shape 224 224 --save-times times.json
    python tools/analysis_tools/simulate_scaling.py --times times.json --gpus 4 16 --bandwidth 300GB/s --inter-bandwidth 25GB/s
    python tools/analysis_tools/simulate_scaling.py --paper
    python tools/analysis_tools/simulate_scaling.py CONFIG --check --batch 8 --shape 64 64

docs/howto/plan_scaling.md says what is modelled, and what isn't.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers what the configs name
from mmman import LocalLearningError
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.experimental.scaling import (
    Link,
    Network,
    Outcome,
    StageProfile,
    parse_bandwidth,
    parse_time,
    simulate_end_to_end,
    simulate_local,
    simulate_pipeline,
)
from mmman.experimental.scaling.machine import Comparison, MachineTimes, check_machine
from mmman.experimental.scaling.measure import WARMUP, ProfileMeter
from mmman.experimental.scaling.table8 import ROWS, RowPrediction, predict
from mmman.runtime.launch import config_argument

CONSOLE = Console(width=118)


def simulate(profile: StageProfile, gpus: list[int], network: Network, staleness: int, flush: int) -> list[Outcome]:
    """Every system on every number of GPUs; a pipeline where K divides it."""
    outcomes = []
    for count in gpus:
        outcomes += [
            simulate_end_to_end(profile, count, network),
            simulate_local(profile, count, network, blockwise=False),
            simulate_local(profile, count, network, blockwise=True),
        ]
        if count % len(profile.blocks) == 0:
            outcomes.append(simulate_pipeline(profile, count, network, staleness, flush))
    return outcomes


def rows_of(outcomes: list[Outcome]) -> list[dict]:
    """Outcomes as records, each with ``speed_up``: its images a second over those of E2E on as many GPUs."""
    base = {outcome.gpus: outcome.images_per_second for outcome in outcomes if outcome.system.startswith('E2E')}
    return [{**asdict(outcome), 'speed_up': outcome.images_per_second / base[outcome.gpus]} for outcome in outcomes]


def outcome_table(rows: list[dict]) -> Table:
    table = _table('predicted', 'GPUs', 'system', 'iteration, ms', 'images/s', 'to E2E, DDP', 'bubble', 'busiest link')
    for row in rows:
        table.add_row(
            str(row['gpus']),
            row['system'],
            f'{1e3 * row["iteration"]:.2f}',
            f'{row["images_per_second"]:.1f}',
            f'{row["speed_up"]:.2f}',
            f'{row["bubble"]:.1%}',
            f'{row["link"]:.1%}',
        )
    return table


def block_table(profile: StageProfile) -> Table:
    names = ('forward, ms', 'head, ms', 'backward, ms', 'update, ms', 'gradients, MB', 'message, MB', 'E2E, ms')
    table = _table(f'blocks, batch {profile.batch}', 'block', *names)
    for j, (block, whole) in enumerate(zip(profile.blocks, profile.end_to_end, strict=False)):
        times = (block.forward, block.head, block.backward, block.update)
        size = (block.gradients + block.head_gradients) / 1e6
        message = f'{profile.message(j) / 1e6:.3f}' if j < len(profile.blocks) - 1 else ''
        table.add_row(str(j + 1), *(f'{1e3 * t:.2f}' for t in times), f'{size:.3f}', message, f'{1e3 * whole.seconds:.2f}')
    return table


def paper_table(predictions: list[RowPrediction]) -> Table:
    """Ratios of seconds an epoch: the paper's, and predicted with blocks of equal time and with blocks as FLOPs have it."""
    names = ('MAN++ / E2E, 1 GPU', 'E2E: DDP / 1 GPU', 'MAN++: PPLL / 1 GPU', 'PPLL / DDP', "PPLL / paper's DDP")
    table = _table('Table VIII, seconds an epoch', 'row', 'K', 'system', *names)
    for p in predictions:
        row = p.row
        name, ratio, ddp = f'{row.dataset} {row.model}', row.local / row.end_to_end, row.end_to_end_ddp
        lines = (
            ('paper', ratio, ddp, row.pipeline),
            ('equal blocks', ratio, p.ddp, p.equal),
            ('FLOPs', p.flops_ratio, p.ddp, p.by_flops),
        )
        for source, local, data_parallel, pipeline in lines:
            ratios = (local, data_parallel / row.end_to_end, pipeline / row.local, pipeline / data_parallel, pipeline / ddp)
            table.add_row(name, str(len(row.blocks)), source, *(f'{value:.2f}' for value in ratios))
            name = ''
        table.add_section()
    return table


def check_table(measured: MachineTimes, comparisons: list[Comparison]) -> Table:
    links = {'messages': measured.point_to_point, 'all-reduce': measured.ring}
    told = ', '.join(f'{name} {link.bandwidth / 1e9:.2f} GB/s {1e6 * link.latency:.0f} us' for name, link in links.items())
    table = _table(told, 'system', 'processes', 'predicted, ms', 'measured, ms', 'predicted / measured')
    for row in comparisons:
        times = (f'{1e3 * row.predicted:.1f}', f'{1e3 * row.measured:.1f}', f'{row.predicted / row.measured:.2f}')
        table.add_row(row.system, str(row.processes), *times)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify='left' if name in ('system', 'row') else 'right')
    return table


def measure_profile(cfg: Config, batch: int, height: int, width: int, iterations: int) -> StageProfile:
    """The profile of a config on this machine."""
    model, optim_wrapper = build_dummy_model(cfg, height, width)
    data = random_batch(model, cfg.default_scope, batch, height, width)
    meter = ProfileMeter(model, optim_wrapper, data)
    for _ in range(WARMUP + iterations):
        meter.lap()
    return meter.profile()


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'config', type=config_argument, nargs='?', help='with a mmman.LocalBackbone; not needed with --times or --paper'
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--measure', action='store_true', help='measure the blocks on this machine, and simulate')
    what.add_argument('--times', metavar='FILE', help='simulate with the times and sizes of this file')
    what.add_argument('--paper', action='store_true', help="the rows of the paper's Table VIII, on its GPUs")
    what.add_argument('--check', action='store_true', help='predict and measure one and two processes of this machine (CPU)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings of the config'
    )
    parser.add_argument('--shape', type=int, nargs=2, default=(224, 224), metavar=('H', 'W'), help='pixels of an image')
    parser.add_argument('--batch', type=int, default=2, help='images of a GPU')
    parser.add_argument('--iterations', type=int, default=5, help='measured steps of each kind')
    parser.add_argument('--save-times', metavar='FILE', help='write what was measured, for --times')
    parser.add_argument('--gpus', type=int, nargs='+', default=[1, 2, 4, 8, 16], metavar='N')
    parser.add_argument('--bandwidth', default='25GB/s', help='of a link inside a machine, one direction; 25GB/s, 200Gb/s')
    parser.add_argument('--latency', default='10us', help='of a link inside a machine')
    parser.add_argument('--inter-bandwidth', help='of a link between machines; default: as inside')
    parser.add_argument('--inter-latency', help='of a link between machines; default: as inside')
    parser.add_argument('--machine', type=int, default=8, metavar='N', help='GPUs a machine')
    parser.add_argument('--loading', default='0s', help='time in which the data loader makes a batch, beside the computing')
    parser.add_argument('--staleness', type=int, default=2, help='batches a stage may be ahead of the next')
    parser.add_argument('--iterations-per-flush', type=int, default=1000, metavar='N', help='batches until a pipeline drains')
    parser.add_argument('--out', metavar='FILE', help='also write the rows as JSON')
    given = parser.parse_args(args)
    if (given.measure or given.check) and not given.config:
        parser.error('--measure and --check need a config')
    return given


def run(args: argparse.Namespace) -> list[dict]:
    """Do what was asked: print the table, return its rows."""
    intra = Link(parse_bandwidth(args.bandwidth), parse_time(args.latency))
    inter = Link(parse_bandwidth(args.inter_bandwidth or args.bandwidth), parse_time(args.inter_latency or args.latency))
    network = Network(intra, inter, args.machine)
    if args.paper:
        predictions = [predict(row, network, args.staleness) for row in ROWS]
        CONSOLE.print(paper_table(predictions))
        return [asdict(prediction) for prediction in predictions]
    if args.times:
        profile = StageProfile.load(args.times)
    else:
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(args.cfg_options or {})
    if args.check:
        measured, comparisons = check_machine(cfg, args.batch, *args.shape, args.iterations)
        CONSOLE.print(check_table(measured, comparisons))
        return [asdict(comparison) for comparison in comparisons]
    if args.measure:
        profile = measure_profile(cfg, args.batch, *args.shape, args.iterations)
    if args.save_times:
        profile.save(args.save_times)
    if loading := parse_time(args.loading):
        profile = replace(profile, loading=loading)
    rows = rows_of(simulate(profile, args.gpus, network, args.staleness, args.iterations_per_flush))
    CONSOLE.print(block_table(profile), outcome_table(rows))
    stages = len(profile.blocks)
    if without := [str(count) for count in args.gpus if count % stages]:
        CONSOLE.print(f'No pipeline on {", ".join(without)} GPUs: {stages} blocks need a multiple of {stages}.')
    return rows


def main() -> None:
    args = parse_args()
    try:
        rows = run(args)
    except LocalLearningError as error:
        raise SystemExit(f'simulate_scaling: {error}') from None
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    main()
