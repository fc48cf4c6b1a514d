"""Two rows of the paper at a toy budget: interrupted, resumed, finished, and then left alone."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tools.benchmarks import paper_rows

pytest.importorskip('mmpretrain')

IMAGES, EPOCHS = 32, 2
ROWS = ('cifar10_resnet32_e2e', 'cifar10_resnet32_k8_dgl')


@pytest.fixture
def npz(test_data, tmp_path):
    """A few images of every class, packed like the whole."""
    source, folder = test_data / 'cifar10', tmp_path / 'small'
    if not source.is_dir():
        pytest.skip(f'no CIFAR-10 at {source}')
    folder.mkdir()
    for split in ('train', 'test'):
        arrays = np.load(source / f'{split}.npz')
        offsets, chosen = arrays['offsets'], np.linspace(0, len(arrays['labels']) - 1, IMAGES).astype(int)
        jpeg = arrays['jpeg']
        files = [jpeg[offsets[i] : offsets[i + 1]] for i in chosen]
        packed = {'jpeg': np.concatenate(files), 'offsets': np.cumsum([0, *map(len, files)])}
        np.savez(folder / f'{split}.npz', labels=arrays['labels'][chosen], classes=arrays['classes'], **packed)
    return folder


@pytest.fixture
def finish(monkeypatch):
    """Runs a command that comes to its end in this process, which has imported everything already."""

    def run(command):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', command[1:])
        monkeypatch.setattr(signal, 'signal', lambda *args: None)
        with pytest.raises(SystemExit) as ending:
            paper_rows.main()
        assert not ending.value.code

    return run


def test_rows_survive_an_interruption(npz, tmp_path, monkeypatch, finish):
    work_dir, table, figure = tmp_path / 'work', tmp_path / 'rows.md', tmp_path / 'rows.png'
    command = [sys.executable, 'tools/benchmarks/paper_rows.py', *(f'configs/paper/table1/{row}.py' for row in ROWS)]
    command += ['--epochs', EPOCHS, '--train-images', 24, '--batch-size', 8, '--lr', 0.1, '--npz', npz, '--jobs', 2]
    command = [*map(str, [*command, '--work-dir', work_dir, '--table', table, '--plot', figure])]
    folders = [work_dir / row / f'{EPOCHS}epochs_24train_{IMAGES}test_batch8_lr0.1' / 'seed0' for row in ROWS]

    def interruptible():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a background job ignores

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible) as first:
        while first.poll() is None and not (folders[0] / 'last_checkpoint').exists():
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        assert 'the same command goes on' in first.communicate()[1]
    assert first.returncode != 0 and not table.exists()

    finish(command)
    assert 'resumed epoch: 1' in (folders[0] / 'log.txt').read_text()
    for row, folder in zip(ROWS, folders, strict=True):
        result = json.loads((folder / 'result.json').read_text())
        assert result['row'] == row and result['budget']['train_images'] == 24
        assert [point['epoch'] for point in result['curve']] == [1, 2]
        assert result['error'] == result['curve'][-1]['error']
        assert f'| {row} |' in table.read_text()
    assert "not the paper's budget" in table.read_text()
    assert figure.stat().st_size > 0
    unpacked = work_dir / 'images' / npz.name
    assert len([*unpacked.glob('train/*/*.jpg')]) == len([*unpacked.glob('val/*/*.jpg')]) == IMAGES

    table.unlink()
    monkeypatch.setattr(paper_rows.Run, 'launch', lambda *args: pytest.fail('a finished run is trained again'))
    finish(command)
    assert table.read_text().count('(n=1)') == len(ROWS)
