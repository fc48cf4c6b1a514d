import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader

import mmman  # noqa: F401  allows training checkpoints
from mmman.errors import CheckpointError
from mmman.runtime.checkpoint import load_from_local


def test_every_local_name_and_url_goes_through_one_reader(tmp_path, monkeypatch):
    """Of what mmengine knows how to load only pavi's own storage is left to mmengine."""
    owners = {loader.__module__ for prefix, loader in CheckpointLoader._schemes.items() if prefix != 'pavi://'}
    assert owners == {'mmman.runtime.checkpoint'}
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    for name, model in (
        ('https://host/path/a-0123abcd.pth', 'a-0123abcd.pth'),
        ('torchvision://resnet18', 'resnet18-f37072fd.pth'),
        ('open-mmlab://detectron/resnet50_gn', 'resnet50_gn-9186a21c.pth'),
    ):
        file = tmp_path / 'checkpoints' / model
        torch.save({'state_dict': {'a': torch.ones(2)}}, file)
        assert CheckpointLoader.load_checkpoint(name, 'cpu', 'silent')['state_dict']['a'].tolist() == [1, 1]
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f'{model} is truncated.*it was downloaded from .*: delete it to download it'):
            CheckpointLoader.load_checkpoint(name, 'cpu', 'silent')
    for name in ('https://host/', 'https://host/..', 'torchvision://no_such_model', 'mmcls://none', str(tmp_path / 'gone.pth')):
        with pytest.raises(CheckpointError) as error:
            CheckpointLoader.load_checkpoint(name, 'cpu', 'silent')
        assert name in str(error.value) and '\n' not in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob('*')).count('..') == 0


def test_what_is_read_is_what_was_saved(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    content = {
        'state_dict': {
            'a': shared,
            'b': shared[1:, ::2],
            'tied': shared,
            'parameter': torch.nn.Parameter(torch.ones(2), requires_grad=False),
            'last': torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
            'empty': torch.empty(0, 3),
            'scalar': torch.tensor(3, dtype=torch.int64),
            **{str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.bool)},
        },
        'meta': {
            'classes': ('a', 'b'),
            'palette': [np.arange(6, dtype='>i2').reshape(2, 3).T, np.array(['a', 'bc']), np.array(2.5), np.zeros((0, 3))],
            'numbers': [np.float32(1.5), np.int64(3), np.bool_(True), 2**70, -1.5, 1j, b'ab', None, {1, 2}, torch.Size([2])],
        },
    }
    for is_new in (True, False):
        torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=is_new)
        read = load_from_local(tmp_path / 'a.pth')
        (tmp_path / 'a.pth').write_bytes(b'written anew')  # nothing that was read is mapped from the file
        assert [*read['state_dict']] == [*content['state_dict']]
        for name, value in content['state_dict'].items():
            ours = read['state_dict'][name]
            assert type(ours) is type(value) and ours.stride() == value.stride() and torch.equal(ours.float(), value.float())
        assert read['state_dict']['tied'].data_ptr() == read['state_dict']['a'].data_ptr()
        assert read['meta']['classes'] == content['meta']['classes'] and read['meta']['numbers'] == content['meta']['numbers']
        for ours, theirs in zip(read['meta']['palette'], content['meta']['palette'], strict=True):
            assert type(ours) is np.ndarray and ours.dtype == theirs.dtype.newbyteorder('=') and np.array_equal(ours, theirs)
        for ours, theirs in zip(read['meta']['numbers'], content['meta']['numbers'], strict=True):
            assert type(ours) is type(theirs)
