"""The grid of Grad-CAM maps of trained toy networks."""

import pytest
import torch

from mmman.errors import ConfigError
from tests.trained import ORDER, ToyImages
from tools.analysis_tools.grad_cam import parse_args, run


def test_a_grid(manpp, e2e, tmp_path):
    picture = tmp_path / 'a.png'
    rows = run(parse_args([str(manpp), str(e2e), '--images', '2', '--unit', 'layer2.1', '--picture', str(picture)]))
    image = ToyImages().images[ORDER[0]].permute(1, 2, 0)
    assert [len(maps) for _, maps in rows] == [2, 2] and picture.stat().st_size > 1000
    torch.testing.assert_close(rows[0][0], (image - image.amin()) / (image.amax() - image.amin()))
    assert all(one.shape == (16, 16) and one.min() >= 0 and one.max() <= 1 for _, maps in rows for one in maps)
    assert not torch.equal(*rows[0][1])


def test_unknown_units_are_refused(manpp, tmp_path):
    with pytest.raises(ConfigError, match=r'--unit layer9: .* has no such unit, but stem, layer1\.0'):
        run(parse_args([str(manpp), '--unit', 'layer9', '--picture', str(tmp_path / 'a.png')]))
