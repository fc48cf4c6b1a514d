"""The rows of the paper: every row expands to the config that was recorded, and is written as a file that reads back."""

import pytest

from tests.config_hashes import digest, recorded, versions
from training_rows.paper_rows import expand, paper_rows

for library in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(library)


def test_every_row_is_what_was_recorded():
    with_versions, hashes = recorded()
    if versions() != with_versions:
        pytest.skip(f'recorded with {with_versions}, not {versions()}')
    assert {name: digest(expand(name)) for name in paper_rows()} == hashes
