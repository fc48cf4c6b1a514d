"""Curves of several runs."""

import json

import pytest

from mmman.errors import ConfigError
from tools.analysis_tools.plot_curves import default_metrics, draw, parse_args, run


def test_curves_of_two_runs(manpp, e2e, tmp_path, capsys):
    words = [manpp, e2e, '--names', 'A', 'B', '--picture', tmp_path / 'a.png', '--out', tmp_path / 'a.json']
    runs = run(parse_args([*map(str, words)]))
    lines = [json.loads(line) for line in next(manpp.rglob('scalars.json')).read_text().splitlines()]
    assert runs['A']['local/2/s'] == [(2, lines[0]['local/2/s']), (4, lines[1]['local/2/s'])]
    assert 'local/1/gradient' in runs['A'] and 'local/1/loss' not in runs['B']
    assert f'{runs["B"]["loss"][-1][1]:.4f} at 4' in capsys.readouterr().out
    assert (tmp_path / 'a.png').stat().st_size > 1000 and json.loads((tmp_path / 'a.json').read_text()).keys() == {'A', 'B'}


def test_panels(tmp_path, monkeypatch):
    """Every kind of value that a run logged gets its panel, with one line a block."""
    curve = [(1, 0.5), (2, 0.25)]
    titles = {}

    def look(figure, path, **options):
        titles.update({axes.get_title(): [line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes})

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', look)
    runs = {'A': {'loss': curve, 'local/1/s': curve, 'local/2/s': curve[:1], 'coco/mAP': curve[1:]}, 'B': {'loss': curve[:1]}}
    assert default_metrics(runs) == ['loss', 'coco/mAP']
    draw(tmp_path / 'a.png', runs, default_metrics(runs))
    assert titles['loss'] == [[0.5, 0.25], [0.5]] and titles['scale s'] == [[0.5, 0.25], [0.5]]
    assert titles['coco/mAP'] == [[0.25]] and 'local loss' not in titles


def test_what_cannot_be_drawn_is_refused(manpp):
    with pytest.raises(ConfigError, match='no run logged it; there are .*local/1/loss'):
        run(parse_args([str(manpp), '--metrics', 'mAP']))
    with pytest.raises(ConfigError, match='--names'):
        run(parse_args([str(manpp), str(manpp)]))
