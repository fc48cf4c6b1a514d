"""Probes of trained toy networks."""

import json

import torch

from mmman.analysis.linear_probe import separability
from tests.trained import ORDER, ToyImages
from tools.analysis_tools.linear_probe import parse_args, run


def test_units_of_two_models(manpp, e2e, tmp_path, capsys):
    words = [manpp, e2e, '--names', 'A', 'B', '--picture', tmp_path / 'a.png', '--out', tmp_path / 'a.json']
    rows = run(parse_args([*map(str, words)]))
    assert json.loads((tmp_path / 'a.json').read_text()) == rows
    assert [(row['model'], row['samples'], row['largest_class']) for row in rows] == [('A', 24, 1 / 3), ('B', 24, 1 / 3)]
    weight = torch.load(manpp / 'iter_4.pth')['state_dict']
    data = ToyImages()
    stem = torch.nn.functional.conv2d(data.images, weight['backbone.stem.weight'], weight['backbone.stem.bias'], padding=1)
    expected = separability(stem.mean((2, 3))[ORDER], data.labels[ORDER], torch.arange(24))
    assert rows[0]['units']['stem'] == {'accuracy': expected.accuracy, 'balanced': expected.balanced}
    assert expected.accuracy > 0.9
    assert (tmp_path / 'a.png').stat().st_size > 1000 and '33.3% are of the largest class' in capsys.readouterr().out
