"""Count what a reader of one training step has to follow: files, functions, changes of file, replaced attributes.

python tools/analysis_tools/trace_step.py configs/retinanet_r18_manpp_k4.py --shape 128 160 --batch 2
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from mmengine.config import Config

import mmman
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.engine.block_groups import BlockGroups
from mmman.memory.chunks import replaced
from mmman.runtime.launch import config_argument

PACKAGE = str(Path(mmman.__file__).parent)
REPLACING = (replaced.__wrapped__.__code__, BlockGroups.restrict.__wrapped__.__code__)
"""Context managers that replace an attribute of an object that isn't mmman's while they are open."""


class Trace:
    """Counts calls of mmman's functions while it is active."""

    def __init__(self) -> None:
        self.functions: Counter[str] = Counter()
        self.changes, self.replaced = 0, Counter()
        self._last: str | None = None
        self._seen: list[FrameType] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != 'call' or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith('<'):
            return
        name = code.co_filename.removeprefix(PACKAGE + '/')
        if self._last not in (None, name):
            self.changes += 1
        self._last = name
        self.functions[f'{name}: {code.co_qualname}'] += 1
        if code in REPLACING and frame not in self._seen:  # a generator's frame is entered twice
            self._seen.append(frame)
            owner = frame.f_locals.get('owner', frame.f_locals.get('self'))
            self.replaced[f'{type(owner).__name__}.{frame.f_locals.get("name", "optimizer.param_groups")}'] += 1

    @property
    def files(self) -> set[str]:
        return {name.split(':')[0] for name in self.functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=config_argument, help='config file, or library::path of one that a library brings')
    parser.add_argument('--shape', type=int, nargs=2, default=(128, 160), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--functions', action='store_true', help='list them')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    model, optim_wrapper = build_dummy_model(cfg, *args.shape)
    data = random_batch(model, cfg.default_scope, args.batch, *args.shape)
    torch.set_num_threads(1)
    model.train_step(data, optim_wrapper)  # what is found out once
    trace = Trace()
    sys.setprofile(trace)
    try:
        model.train_step(data, optim_wrapper)
    finally:
        sys.setprofile(None)
    print(f'{len(trace.files)} files, {len(trace.functions)} functions, {trace.changes} changes of file')
    names = ', '.join(f'{count} x {name}' for name, count in trace.replaced.items())
    print(f'{trace.replaced.total()} replaced attributes: {names or "none"}')
    if args.functions:
        print(*(f'{count:6} {name}' for name, count in sorted(trace.functions.items())), sep='\n')


if __name__ == '__main__':
    main()
