"""Keeps the console line of a training iteration short: of all local losses it prints one number a block."""

from __future__ import annotations

import re
from typing import Any

from mmengine.runner import LogProcessor, Runner

from mmman.registry import LOG_PROCESSORS

_LOCAL_ITEM = re.compile(r'  local/\d+/\S+: \S+')


@LOG_PROCESSORS.register_module()
class LocalLogProcessor(LogProcessor):
    """mmengine's log processor with a short console line for local learning.

    Values named ``local/<block>/<name>`` (losses, scales s_j and gradient norms of the local heads) go to the visualization
    backends as usual, for example to ``vis_data/scalars.json``. The console line has ``local losses:`` instead, with the
    ``local/<block>/loss`` of each block in order. The arguments are those of :class:`mmengine.runner.LogProcessor`.
    """

    def get_log_after_iter(self, runner: Runner, batch_idx: int, mode: str) -> tuple[dict[str, Any], str]:
        """Return the values of an iteration for the backends, and the line for the console."""
        tag, line = super().get_log_after_iter(runner, batch_idx, mode)
        names = (re.fullmatch(rf'(?:{mode}/)?local/(\d+)/loss', name) for name in tag)
        losses = {int(name[1]): tag[name[0]] for name in names if name}
        if losses:
            summary = ' '.join(f'{losses[block]:.{self.num_digits}f}' for block in sorted(losses))
            line = f'{_LOCAL_ITEM.sub("", line)}  local losses: {summary}'
        return tag, line
