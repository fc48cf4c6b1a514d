"""The comparison of trained models: rows and columns, and known values."""

import json

import pytest
import torch

from mmman.errors import ConfigError
from tools.analysis_tools.compare_features import parse_args, run


def compare(*words):
    return run(parse_args([*map(str, words), '--batch-size', '8']))


def test_a_model_with_itself(manpp):
    found = compare(manpp, manpp / 'iter_4.pth')
    cka = torch.tensor(found['cka'])
    assert found['units'][0] == [*(['stem'] + [f'layer{i}.{j}' for i in (1, 2, 3) for j in (0, 1)]), 'the image']
    torch.testing.assert_close(cka.diag(), torch.ones(8))
    torch.testing.assert_close(cka, cka.T)
    assert cka[0, -2] < 0.99


def test_another_model_with_picture_and_numbers(manpp, e2e, tmp_path, capsys):
    found = compare(e2e, manpp, '--names', 'E2E', 'MAN', '--picture', tmp_path / 'a.png', '--out', tmp_path / 'a.json')
    assert json.loads((tmp_path / 'a.json').read_text()) == found and found['models'] == ['E2E', 'MAN']
    assert (tmp_path / 'a.png').stat().st_size > 1000
    row = next(line for line in capsys.readouterr().out.splitlines() if 'layer1.0' in line and line.split()[1] == 'layer1.0')
    assert f'{found["cka"][1][1]:.3f}' in row and f'{found["cka"][1][-1]:.3f}' in row
    assert max(found['cka'][1][:-1]) < 1 and found['cka'][-1][-1] == pytest.approx(1)


def test_small_batches_are_refused(manpp):
    with pytest.raises(ConfigError, match='--batch-size 3: .* at least 4'):
        run(parse_args([str(manpp), str(manpp), '--batch-size', '3']))
