"""Profiles: their files, their totals, and invalid values."""

import pytest

from mmman import LocalLearningError
from mmman.experimental.scaling import BlockCost, StageProfile
from tests.unit.experimental.scaling.test_simulate import profile, stages


def test_a_profile_survives_its_file(tmp_path):
    given = profile(*stages(0.5, 0.25, features=3.0, needs_images=True), images=5.0, loading=0.1)
    given.save(tmp_path / 'times.json')
    assert StageProfile.load(tmp_path / 'times.json') == given


def test_totals_keep_proportions_and_sizes():
    given = profile(*stages(0.5, 0.25, features=3.0)).with_totals(3.0, 2.0)
    assert [block.seconds for block in given.blocks] == pytest.approx([2.0, 1.0])
    assert given.end_to_end[0].seconds == pytest.approx(2.0)
    assert given.blocks[0].features == 3.0


@pytest.mark.parametrize(
    'mistake, says',
    [
        (lambda: profile(BlockCost(float('nan'))), 'forward=nan'),
        (lambda: profile(BlockCost(-1.0)), 'forward=-1.0'),
        (lambda: profile(), 'needs a batch'),
        (lambda: profile(BlockCost(0.0)), 'are 0'),
        (lambda: StageProfile.load('nowhere.json'), 'nowhere.json is not a profile'),
    ],
)
def test_mistakes_say_what_to_change(mistake, says):
    with pytest.raises(LocalLearningError, match=says) as caught:
        mistake()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text, says', [('{"batch": 1}', 'blocks'), ('[]', 'not a profile'), ('{"batch": 1, "blocks": [{"fwd": 1}]}', 'fwd')]
)
def test_a_file_that_is_not_a_profile(text, says, tmp_path):
    path = tmp_path / 'times.json'
    path.write_text(text)
    with pytest.raises(LocalLearningError, match=says):
        StageProfile.load(path)
