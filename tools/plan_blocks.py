"""Plan the cuts of a config by memory, without running it at its size.

    python tools/plan_blocks.py CONFIG [KEY=VALUE ...] --shape 608 1024 --batch 2 --blocks 4
    python tools/plan_blocks.py CONFIG [KEY=VALUE ...] --shape 608 1024 --target-memory 4GB
    python tools/plan_blocks.py CONFIG [KEY=VALUE ...] --shape 608 1024 --max-overhead 0.3 --recompute [--blocks 4]

CONFIG is one with an mmman.LocalBackbone; its num_blocks and partition don't count. It prints the line to paste into the
config, what the peak of a training step will be and of what it is made, and the same of other cuts and of end-to-end training
without recompute and chunks. Bytes are those of live tensors, as tools/analysis_tools/measure_training.py counts them.
docs/howto/plan_memory.md says more.
"""

from __future__ import annotations

import argparse
import copy
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers what the configs name
from mmman import LocalLearningError
from mmman.analysis.backbone_cost import predict_cost
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.paper_cost import CHANNEL, UNIT, choose_blocks
from mmman.analysis.sizes_only import SizesOnly
from mmman.analysis.training import StepMeter
from mmman.errors import CostError, PartitionError
from mmman.memory.detection.focal_loss import fused_focal_loss
from mmman.partition import chain_of, plan_blocks
from mmman.planning.costs import MemoryPlan, Peak, peak_of
from mmman.planning.profile import Profile, profile_step
from mmman.planning.search import fewest_flops, smallest_peak

CONSOLE = Console(width=140)
MB = 1e6
UNITS = {'kB': 1e3, 'MB': 1e6, 'GB': 1e9, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}


@dataclass(frozen=True)
class PlanChoice:
    """A plan and what is expected of it; ``overhead`` is how many more FLOPs there are than end to end, relative to those."""

    name: str
    plan: MemoryPlan
    peak: Peak
    overhead: float


def choose(profile: Profile, args: argparse.Namespace) -> list[PlanChoice]:
    """The plan that was asked for, then the cuts by stage and by number of units with as many blocks, then end to end.

    End to end nothing is recomputed, and all images run at once. Where the plan chooses what to recompute, the other cuts
    recompute all that can be.

    Raises:
        CostError: There is no such plan.
    """
    step = profile.step
    if args.target_memory is not None:
        planned = fewest_flops(step, args.target_memory, args.blocks)
    else:
        planned = smallest_peak(step, args.blocks, args.max_overhead)
    count = len(planned.modes)
    others = {name: MemoryPlan(cuts, step.choices[-1:] * count) for name, cuts in _library_cuts(profile, count).items()}
    plans = {'planned': planned, **others}
    choices = [PlanChoice(name, plan, peak_of(step, plan), step.overhead(plan)) for name, plan in plans.items()]
    return [*choices, PlanChoice('end to end', MemoryPlan(), profile.whole, 0.0)]


def _library_cuts(profile: Profile, count: int) -> dict[str, tuple[int, ...]]:
    """What ``partition='stage'`` and ``'uniform'`` cut, where the last block makes an output."""
    model, _ = build_dummy_model(copy.deepcopy(profile.config), *profile.shape[2:])
    chain = chain_of(model.backbone)
    trainable = [unit.is_trainable(model.backbone) for unit in chain.units]
    found = {}
    for partition in ('stage', 'uniform') if count > 1 else ():
        try:
            blocks = plan_blocks(chain, trainable, count, partition).blocks
        except PartitionError:
            continue
        cuts = tuple(profile.names.index(block[-1].name) for block in blocks[:-1])
        if set(cuts) <= set(profile.step.candidates):
            found[partition] = cuts
    return found


def localized(profile: Profile, plan: MemoryPlan) -> Config:
    """The config as planned."""
    cfg = copy.deepcopy(profile.config)
    cfg.model.backbone.update(profile.options(plan))
    return cfg


def tables(profile: Profile, choices: list[PlanChoice]) -> list[Table]:
    """One line a choice, and the parts of the peaks."""
    batch, _, height, width = profile.shape
    whole = choices[-1].peak.total
    summary = Table(title=f'expected of a training step, batch {batch}, {height}x{width}')
    summary.add_column('cuts')
    summary.add_column('after', overflow='fold')
    for name in ('peak, MB', 'to end to end', 'FLOPs', 'at the peak runs'):
        summary.add_column(name, justify='right', no_wrap=True)
    parts = Table(title='parts of the peak, MB')
    parts.add_column('part')
    for choice in choices:
        summary.add_row(
            choice.name,
            ' '.join(profile.names[cut] for cut in choice.plan.cuts),
            f'{choice.peak.total / MB:.1f}',
            f'{choice.peak.total / whole - 1:+.1%}',
            f'{choice.overhead:+.1%}',
            choice.peak.moment,
        )
        parts.add_column(choice.name, justify='right')
    for part in choices[0].peak.parts:
        parts.add_row(part, *(f'{choice.peak.parts[part] / MB:.1f}' for choice in choices))
    return [summary, parts]


def guideline(profile: Profile, planned: PlanChoice, whole: PlanChoice) -> list[str]:
    """What the paper's cost model says of the same cuts: it counts the backbone's activations and the transfers alone."""
    if not planned.plan.cuts:
        return []
    cfg = localized(profile, planned.plan)
    transfer = cfg.model.backbone.get('transfer') or {}
    ratio, layers = round(planned.peak.total / whole.peak.total, 3), len(profile.names)
    lines = []
    try:
        cost = predict_cost(build_dummy_model(cfg, *profile.shape[2:])[0], profile.shape)
        for name, one in (('Eq. 13 and 17', cost.formulas), ('the same summed over the units', cost.summed)):
            lines.append(f"paper's cost model, {name}: FLOPs {one.flops - 1:+.1%}, activations {one.activations - 1:+.1%}")
        fit = choose_blocks(
            layers, ratio, planned.overhead, CHANNEL if transfer.get('bias') in ('channel', 'depthwise') else UNIT
        )
        lines.append(f"paper's guideline for {ratio:.0%} and {planned.overhead:+.1%}: K = {fit[0]} to {fit[-1]}")
    except CostError as error:
        lines.append(f"paper's guideline for {ratio:.0%} and {planned.overhead:+.1%}: {error}")
    return lines


def measured_peak(profile: Profile, plan: MemoryPlan) -> int:
    """Bytes at the peak of one training step: a real one for detectors, else one without data, which fits any machine."""
    cfg = localized(profile, plan)
    batch, _, height, width = profile.shape
    sizes_only = None if cfg.default_scope == 'mmdet' else SizesOnly()
    model, optim_wrapper = build_dummy_model(cfg, height, width, sizes_only)
    data = random_batch(model, cfg.default_scope, batch, height, width)
    with sizes_only or nullcontext():
        return StepMeter(model, optim_wrapper, data).memory().peak


def size(text: str) -> int:
    """Bytes, of a number with a unit."""
    found = re.fullmatch(r'([0-9.]+) *([kMG]i?B)', text)
    if not found or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f'{text!r}: give a size such as 8GB or 7.5GiB')
    return int(float(found[1]) * UNITS[found[2]])


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n\n')[0],
        epilog=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config')
    parser.add_argument('options', nargs='*', metavar='KEY=VALUE', help='overrides, in the syntax of --cfg-options')
    parser.add_argument('--shape', type=int, nargs=2, default=(608, 1024), metavar=('H', 'W'), help='pixels, multiples of 32')
    parser.add_argument('--batch', type=int, help="images; default: the config's train_dataloader.batch_size")
    parser.add_argument('--blocks', type=int, metavar='K', help='with K blocks: alone, the smallest peak')
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument('--target-memory', type=size, metavar='8GB', help='the fewest FLOPs within that peak')
    wish.add_argument('--max-overhead', type=float, metavar='0.1', help='the smallest peak with at most so many more FLOPs')
    parser.add_argument(
        '--recompute',
        action='store_true',
        help='also choose the blocks to recompute, selectively or in full; what the config recomputes does not count',
    )
    parser.add_argument('--fused-focal-loss', action='store_true', help="mmdet's focal loss has the memory of a GPU's kernel")
    parser.add_argument('--check', action='store_true', help='take one step with the planned cuts (without data), and compare')
    given = parser.parse_intermixed_args(args)
    if (given.blocks, given.target_memory, given.max_overhead) == (None, None, None):
        parser.error('ask for a plan: --blocks, --target-memory or --max-overhead')
    if not Path(given.config).is_file():
        parser.error(f'{given.config} is no file')
    if bad := [word for word in given.options if '=' not in word]:
        parser.error(f'{bad[0]} is no KEY=VALUE')
    return given


def run(args: argparse.Namespace) -> list[PlanChoice]:
    """Profile, plan and print. Returns what was printed: the plan, other cuts, end to end."""
    cfg = Config.fromfile(args.config)
    words = argparse.ArgumentParser()
    words.add_argument('--options', nargs='*', action=DictAction, default={})
    cfg.merge_from_dict(words.parse_args(['--options', *args.options]).options)
    profile = profile_step(cfg, args.batch or cfg.train_dataloader.batch_size, *args.shape, args.recompute)
    choices = choose(profile, args)
    planned, whole = choices[0], choices[-1]
    CONSOLE.print(*tables(profile, choices), sep='\n')
    for line in guideline(profile, planned, whole):
        CONSOLE.print(line, highlight=False)
    pasted = ', '.join(f'{key}={value!r}' for key, value in profile.options(planned.plan).items())
    CONSOLE.print(f'\nin model.backbone:  {pasted}', markup=False, highlight=False, soft_wrap=True)
    if args.check:
        peak = measured_peak(profile, planned.plan)
        CONSOLE.print(f'measured: {peak / MB:.1f} MB, the prediction is {planned.peak.total / peak - 1:+.2%} off')
    return choices


def main() -> None:
    MMLogger.get_instance('plan_blocks', log_level='WARNING')
    args = parse_args()
    try:
        with fused_focal_loss() if args.fused_focal_loss else nullcontext():
            run(args)
    except LocalLearningError as error:
        raise SystemExit(f'{type(error).__name__}: {error}') from None


if __name__ == '__main__':
    main()
