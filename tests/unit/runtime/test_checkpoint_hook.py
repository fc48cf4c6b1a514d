"""Removals that wait until a checkpoint is complete, and the lists of files that a checkpoint brings.

Runs that are killed while they save are in tests/integration/test_checkpoint_faults.py and test_own_files.py.
"""

from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub

from mmman.runtime import checkpoint_hook
from mmman.runtime.checkpoint_hook import DeferredRemovals, _take_lists


class Backend:
    def __init__(self):
        self.removed = []

    def remove(self, path):
        if 'gone' in path:
            raise FileNotFoundError(path)
        self.removed.append(('file', path))

    def rmtree(self, path):
        self.removed.append(('folder', path))

    def join_path(self, *parts):
        return '/'.join(parts)


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(checkpoint_hook, 'print_log', lambda message, **_: messages.append(message))
    return messages


def test_only_own_files_are_removed_and_only_at_the_flush(said):
    backend = Backend()
    deferred = DeferredRemovals(backend, lambda path: 'other' not in path)
    for path in ('a', 'other', 'b', 'gone'):
        deferred.remove(path)
    deferred.rmtree('folder')
    deferred.keep('b')
    assert deferred.paths == ['a', 'other', 'gone', 'folder'] and backend.removed == []
    assert deferred.join_path('x', 'y') == 'x/y'
    deferred.flush()
    assert backend.removed == [('file', 'a'), ('folder', 'folder')] and deferred.paths == []
    assert said[0] == 'Kept other: this run did not write it' and said[1].startswith('Kept gone, remove it by hand')


def test_lists_of_a_checkpoint_are_taken_from_the_log_unless_they_are_of_other_types():
    hub = MessageHub('test_checkpoint_hook')
    listed = {
        'superseded_ckpts': ['a', 3],
        'keep_ckpt_ids': [1, True, 'b', 2],
        'best_ckpt': 'best.pth',
        'best_ckpt_acc': 4,
        'epoch': 5,
    }
    for name, value in listed.items():
        hub.update_info(name, value)
    found = _take_lists(SimpleNamespace(message_hub=hub))
    assert found == {'superseded_ckpts': ['a'], 'keep_ckpt_ids': [1, 2], 'best_ckpt': 'best.pth'}
    left = {name: hub.get_info(name) for name in listed}
    assert left == {'superseded_ckpts': [], 'keep_ckpt_ids': [], 'best_ckpt': None, 'best_ckpt_acc': None, 'epoch': 5}
