"""Scalars of work folders."""

import json

import pytest

from mmman.analysis.scalars import by_block, read_scalars
from mmman.errors import ConfigError


def write(folder, time, *lines):
    path = folder / time / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    write(tmp_path, '1', *({'loss': step, 'iter': step, 'step': step} for step in (10, 20, 30)), '{"loss": 4')
    write(tmp_path, '2', *({'loss': -step, 'iter': step, 'step': step} for step in (20, 40)), {'mAP': 0.5, 'step': 45})
    assert read_scalars(tmp_path) == {'loss': [(10, 10), (20, -20), (40, -40)], 'mAP': [(45, 0.5)]}


def test_validations_of_epochs_stand_at_iterations(tmp_path):
    lines = [{'time': 1, 'epoch': 1, 'iter': 100, 'step': 100}, {'acc': 0.1, 'time': 9, 'step': 1}]
    lines += [{'loss': 1, 'epoch': 2, 'iter': 200, 'step': 200}, {'acc': 0.2, 'step': 2}]
    write(tmp_path, '1', *lines)
    assert read_scalars(tmp_path) == {'acc': [(100, 0.1), (200, 0.2)], 'time': [(100, 1)], 'loss': [(200, 1)]}


def test_a_validation_of_epoch_zero_does_not_hide_an_earlier_run(tmp_path):
    write(tmp_path, '1', {'loss': 1, 'iter': 10, 'step': 10}, {'acc': 0.1, 'step': 0})
    write(tmp_path, '2', {'loss': 2, 'iter': 20, 'step': 20}, {'acc': 0.2, 'step': 0})
    assert read_scalars(tmp_path) == {'loss': [(10, 1), (20, 2)], 'acc': [(10, 0.1), (20, 0.2)]}


def test_curves_of_blocks(tmp_path):
    values = {'local/10/s': 3, 'local/2/s': 1, 'local/2/s_other': 0, 'loss': 0, 'local/2/loss': 7}
    write(tmp_path, '1', {**values, 'iter': 1, 'step': 1})
    curves = read_scalars(tmp_path)
    assert by_block(curves, 's') == {2: [(1, 1)], 10: [(1, 3)]} and [*by_block(curves, 's')] == [2, 10]
    assert by_block(curves, 'loss') == {2: [(1, 7)]}


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='LocalVisBackend'):
        read_scalars(tmp_path)
    write(tmp_path, '1', 'text', {'loss': 1, 'step': 1})
    with pytest.raises(ConfigError, match='line 1'):
        read_scalars(tmp_path)
