"""torchvision's datasets in mmpretrain's pipelines, from tiny files in the original formats."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmman.datasets import TorchvisionDataset

torchvision = pytest.importorskip('torchvision')
SVHN, STL10 = torchvision.datasets.SVHN, torchvision.datasets.STL10


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Four 32x32 images and their labels; in the files a digit 0 has label 10 and images come last."""
    io = pytest.importorskip('scipy.io')
    monkeypatch.setattr(SVHN, '_check_integrity', lambda self: (tmp_path / self.filename).is_file())
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    stored = {'X': images.transpose(1, 2, 3, 0), 'y': np.array([[10], [3], [9], [1]], dtype=np.uint8)}
    io.savemat(tmp_path / 'train_32x32.mat', stored)
    return tmp_path, images, [0, 3, 9, 1]


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Three 96x96 images and their labels; in the files labels start at 1 and images are (3, W, H)."""
    monkeypatch.setattr(STL10, '_check_integrity', lambda self: True)
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    folder = tmp_path / 'stl10_binary'
    folder.mkdir()
    images.transpose(0, 3, 2, 1).tofile(folder / 'test_X.bin')
    np.array([10, 1, 4], dtype=np.uint8).tofile(folder / 'test_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join(f'class {i}' for i in range(10)))
    return tmp_path, images, [9, 0, 3]


def assert_holds(dataset, images, labels):
    assert len(dataset) == len(images)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        info = dataset[i]
        assert info.keys() == {'img', 'gt_label', 'sample_idx'}
        assert np.array_equal(info['img'], image) and info['img'].dtype == np.uint8
        assert (info['gt_label'], info['sample_idx']) == (label, i)
        assert dataset.get_cat_ids(i) == [label]


def test_svhn(svhn):
    root, images, labels = svhn
    dataset = TorchvisionDataset('SVHN', root, 'train')
    assert_holds(dataset, images, labels)
    assert_holds(pickle.loads(pickle.dumps(dataset)), images, labels)
    assert dataset.metainfo == {'classes': tuple('0123456789')}


def test_stl10(stl10):
    root, images, labels = stl10
    dataset = TorchvisionDataset('STL10', root, 'test', test_mode=True)
    assert_holds(dataset, images, labels)
    assert dataset.metainfo['classes'][9] == 'class 9'


def test_mmengine_options(svhn):
    root, images, labels = svhn
    dataset = TorchvisionDataset('SVHN', root, 'train', indices=[2, 0], lazy_init=True, metainfo={'classes': ['a', 'b']})
    assert dataset.source is None
    assert dataset.metainfo == {'classes': ['a', 'b']}
    assert_holds(dataset, images[[2, 0]], [9, 0])
    assert_holds(TorchvisionDataset('SVHN', root, 'train', indices=3, serialize_data=False), images[:3], labels[:3])


def test_a_pipeline_gets_what_it_gets_from_cifar10(tmp_path, svhn, monkeypatch):
    cifar = pytest.importorskip('mmpretrain.datasets').CIFAR10
    root, images, labels = svhn
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    stored = {'data': images.transpose(0, 3, 1, 2).reshape(4, -1), 'labels': labels}
    (folder / 'test_batch').write_bytes(pickle.dumps(stored))
    monkeypatch.setattr(cifar, '_check_integrity', lambda self: True)
    pipeline = [{'type': 'RandomFlip', 'prob': 1.0}, {'type': 'PackInputs'}]
    init_default_scope('mmpretrain')
    ours = DATASETS.build(
        {'type': 'mmman.TorchvisionDataset', 'dataset': 'SVHN', 'data_root': str(root), 'split': 'train', 'pipeline': pipeline}
    )
    theirs = DATASETS.build({'type': 'CIFAR10', 'data_root': str(root), 'split': 'test', 'pipeline': pipeline})
    for a, b in zip(ours, theirs, strict=True):
        assert a['inputs'].equal(b['inputs'])
        assert a['data_samples'].gt_label.equal(b['data_samples'].gt_label)
        assert a['data_samples'].metainfo == b['data_samples'].metainfo


def test_classes_of_other_signatures():
    grey = TorchvisionDataset('FakeData', size=2, image_size=(1, 8, 9), num_classes=4)
    assert grey[1]['img'].shape == (8, 9, 3)
    assert 'classes' not in grey.metainfo
    assert TorchvisionDataset('MNIST', 'nowhere', 'test', lazy_init=True).options == {'root': 'nowhere', 'train': False}
    options = TorchvisionDataset('EMNIST', 'nowhere', 'balanced', lazy_init=True, train=True).options
    assert options == {'root': 'nowhere', 'split': 'balanced', 'train': True}


def test_image_folder(tmp_path):
    cv2 = pytest.importorskip('cv2')
    image = np.full((8, 8, 3), (0, 0, 255), dtype=np.uint8)  # red, as OpenCV writes it
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / '0.png'), image)
    dataset = TorchvisionDataset('ImageFolder', tmp_path)
    assert dataset.metainfo['classes'] == ('a', 'b')
    assert dataset[1]['gt_label'] == 1
    assert (dataset[1]['img'] == [255, 0, 0]).all()


@pytest.mark.parametrize('name', ['VOCDetection', 'SVNH', 'ImageNet'])
def test_unknown_dataset(name):
    with pytest.raises(
        ValueError, match=f"dataset='{name}' is not a classification dataset of torchvision: choose CIFAR10, .*, STL10, "
    ):
        TorchvisionDataset(name, 'nowhere')


def test_unknown_split_or_option():
    with pytest.raises(ValueError, match="Valid values are .*'extra'"):
        TorchvisionDataset('SVHN', 'nowhere', 'val')
    with pytest.raises(ValueError, match="MNIST has no split 'val': set 'train' or 'test'"):
        TorchvisionDataset('MNIST', 'nowhere', 'val')
    with pytest.raises(ValueError, match='EuroSAT has no split .*: remove split'):
        TorchvisionDataset('EuroSAT', 'nowhere', 'train')
    with pytest.raises(ValueError, match='SVHN has no option folds; the options are download, root, split'):
        TorchvisionDataset('SVHN', 'nowhere', 'train', folds=1)
    with pytest.raises(ValueError, match='torchvision cannot download FER2013'):
        TorchvisionDataset('FER2013', 'nowhere', 'train', download=True)


@pytest.mark.parametrize(
    ('name', 'split', 'remedy'),
    [
        ('SVHN', 'test', 'download http.*test_32x32.mat to {root}/test_32x32.mat, or set download=True'),
        ('STL10', 'train', 'download http.*stl10_binary.tar.gz and unpack it in {root} to get {root}/stl10_binary, or'),
        ('FER2013', 'train', 'see the documentation of torchvision.datasets.FER2013 for the files. torchvision: '),
        ('ImageFolder', None, 'the documentation of torchvision.datasets.ImageFolder'),
    ],
)
def test_missing_data_is_said_and_not_downloaded(name, split, remedy, tmp_path):
    root = tmp_path / 'data'
    with pytest.raises(
        FileNotFoundError, match=f'does not contain the original files of {name}: .*' + remedy.format(root=root)
    ):
        TorchvisionDataset(name, root, split)
    assert not root.exists()


def test_download_is_done_when_asked(svhn, monkeypatch):
    root, images, labels = svhn
    asked = []
    monkeypatch.setattr(SVHN, 'download', lambda self: asked.append(self.filename))
    assert_holds(TorchvisionDataset('SVHN', root, 'train', download=True), images, labels)
    assert asked == ['train_32x32.mat']


def test_import_needs_neither_torchvision_nor_mmpretrain():
    block = 'import sys\nfor name in ("torchvision", "mmpretrain"): sys.modules[name] = None\n'
    subprocess.run([sys.executable, '-c', f'{block}import mmman, mmman.registry, mmman.datasets'], check=True)
