"""Files that are no complete checkpoint, without loading them. Every kind of damage is in the tests of hostile checkpoints."""

import zipfile

import pytest
import torch

from mmman.errors import CheckpointError
from mmman.runtime.archive import check_archive, format_path

FIVE_HUNDRED = torch.tensor([500.0]).numpy().tobytes()


@pytest.fixture
def saved(tmp_path):
    torch.save({'state_dict': {'a': torch.arange(1000.0)}}, tmp_path / 'a.pth')
    return tmp_path / 'a.pth'


def test_only_an_archive_has_checksums(saved, tmp_path):
    assert check_archive(saved)
    torch.save({'a': torch.ones(1)}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert not check_archive(tmp_path / 'old.pth')


def rewritten(saved, change=lambda name, content: [(name, content)], **options):
    """The archive with other records."""
    with zipfile.ZipFile(saved) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(saved, 'w', **options) as archive:
        for record in records:
            for name, content in change(*record):
                archive.writestr(name, content)
    return saved


def flip(path):
    path.write_bytes(path.read_bytes().replace(FIVE_HUNDRED, b'    '))


def beside(name, content=b''):
    """Adds a record after the first one."""
    return lambda path: rewritten(path, lambda n, c: [(n, c), (name, content)] if n == 'a/data.pkl' else [(n, c)])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: path.unlink(), '^does not exist$'),
        (lambda path: (path.unlink(), path.mkdir()), '^is not a file$'),
        (lambda path: path.write_bytes(b''), '^is empty$'),
        (lambda path: path.write_bytes(b'text'), 'does not begin like a file of torch.save$'),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), '^is truncated'),
        (flip, 'the checksum of its record a/data/0 is wrong'),
        (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), 'its records are compressed'),
        (lambda path: rewritten(path, lambda n, c: [(n.replace('data.pkl', 'text'), c)]), '^is a zip archive, but not a'),
        (beside('a/DATA.pkl'), 'two of its records have the same name'),
        (beside('a/constants.pkl'), '^is a TorchScript archive'),
        (beside('a/../b'), "a record named 'a/../b'"),
        (beside('b/data.pkl'), '^is a zip archive, but not a'),
    ],
)
def test_the_damage_is_named(damage, message, saved):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_archive(saved)
    assert str(saved) not in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('is_new', [True, False])
def test_a_file_that_names_a_function_is_refused_before_it_is_loaded(is_new, tmp_path):
    torch.save({'meta': print}, tmp_path / 'a.pth', _use_new_zipfile_serialization=is_new)
    with pytest.raises(CheckpointError, match=r'builtins\.print, which .*: loading it could run code'):
        check_archive(tmp_path / 'a.pth')


def test_paths_in_messages_are_on_one_line():
    assert format_path('a b/c.pth') == 'a b/c.pth'
    assert format_path('a\nb.pth') == r"'a\nb.pth'"
