"""Messages that end a program: one line, whatever is put into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmman.errors import LocalLearningError

MAX_LENGTH = 400


def one_line(text: object, max_length: int = MAX_LENGTH) -> str:
    """The text on one line: without control characters, and cut where it is long."""
    line = ''.join(character if character.isprintable() else ' ' for character in str(text))
    line = ' '.join(line.split())
    return line if len(line) <= max_length else f'{line[: max_length - 4]} ...'


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """Inside this context an error of mmman ends the program with its name and message, without a traceback."""
    try:
        yield
    except LocalLearningError as error:
        raise SystemExit(f'{type(error).__name__}: {error}') from None
