"""Where a process is: the position that it records, and the code that its stack shows."""

import sys
import threading
import types

import torch.distributed as dist

from mmman.watchdog import monitor
from mmman.watchdog.progress import Progress, code_of_thread


def code_while(function):
    """The code that a thread shows while it waits inside ``function``."""
    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=function, args=(ready, done))
    thread.start()
    ready.wait()
    code = code_of_thread(thread.ident)
    done.set()
    thread.join()
    return code


def loads(ready, done):
    ready.set()
    done.wait()


def test_code_of_a_thread_skips_libraries():
    code = code_while(loads)
    assert code.text.startswith('watchdog/test_progress.py:') and code.text.endswith(' in loads')
    assert not code.waits and sys.modules['threading'].__file__ not in code.text


def test_a_thread_that_waits_for_the_watchdog_shows_no_code():
    waits = types.FunctionType(loads.__code__.replace(co_filename=monitor.__file__), globals())
    assert code_while(waits).text == ''


def in_collective(ready, done):
    loads(ready, done)


def test_a_collective_is_named_with_the_code_that_calls_it():
    code = loads.__code__.replace(co_filename=dist.distributed_c10d.__file__, co_name='all_reduce')
    waits = types.FunctionType(in_collective.__code__, {'loads': types.FunctionType(code, globals())})
    found = code_while(waits)
    assert found.waits and found.text.startswith('all_reduce, called at watchdog/test_progress.py:')
    assert found.text.endswith(' in in_collective')


def test_a_thread_that_has_ended_shows_no_code():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert code_of_thread(thread.ident) == ('', False)


def test_every_move_is_another_position():
    progress = Progress()
    progress.move('the forward pass of iteration 3', (2, 1), timed=True)
    first = progress.position
    progress.move('the forward pass of iteration 3', (2, 1), timed=True)
    assert first == (1, 'the forward pass of iteration 3', (2, 1), True)
    assert progress.position == first._replace(moves=2)
    progress.move('the evaluation', (2, 5))
    assert not progress.position.timed
