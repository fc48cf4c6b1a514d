"""Progress of a process: the position that the training thread records, and the code that its Python stack shows."""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import NamedTuple

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_COLLECTIVES = os.path.join(_TORCH, 'distributed') + os.sep
_MONITOR = os.path.join(os.path.dirname(__file__), 'monitor.py')
_STANDARD_LIBRARY = sysconfig.get_paths()['stdlib'] + os.sep


class Position(NamedTuple):
    """A position in a run.

    Attributes:
        moves: Number of position changes so far. Positions of a process with equal numbers are the same.
        text: Description of the position, for example ``'the forward pass of iteration 7'``.
        order: Iteration, and step within the iteration. A process with a smaller order is behind.
        timed: Whether the position must change within the watchdog's timeout. False for positions of unbounded duration:
            set-up, evaluation, checkpoints, the first iterations.
    """

    moves: int
    text: str
    order: tuple[int, ...]
    timed: bool


class Progress:
    """The current position of this process. The training thread sets it by one assignment; the watchdog's threads read it."""

    def __init__(self) -> None:
        self.position = Position(0, '', (0,), False)

    def move(self, text: str, order: tuple[int, ...], timed: bool = False) -> None:
        """Record the position of the training thread. For the arguments see :class:`Position`."""
        self.position = Position(self.position.moves + 1, text, order, timed)


class Code(NamedTuple):
    """The innermost stack frame of a thread that is neither in torch nor in Python's standard library.

    Attributes:
        text: File, line and function, and the collective that the function calls, if any.
        waits: Whether the thread is in a function of ``torch.distributed``.
    """

    text: str
    waits: bool


def code_of_thread(ident: int) -> Code:
    """The code that a thread of this process executes, read from its Python stack. Empty while it waits for the watchdog.

    Args:
        ident: Identifier of the thread (:func:`threading.get_ident`).
    """
    frame = sys._current_frames().get(ident)
    collective = ''
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _MONITOR:
            return Code('', False)
        if code.co_filename.startswith(_COLLECTIVES):
            collective = code.co_name
        elif not _is_library(code.co_filename):
            break
        frame = frame.f_back
    if frame is None:
        return Code('', False)
    where = f'{"/".join(frame.f_code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}'
    return Code(f'{collective}, called at {where}' if collective else where, bool(collective))


def _is_library(path: str) -> bool:
    own = path.startswith(_STANDARD_LIBRARY) and 'site-packages' not in path
    return own or path.startswith(_TORCH) or path.startswith('<')
