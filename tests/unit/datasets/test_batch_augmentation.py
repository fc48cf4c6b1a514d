"""Batch augmentation equals mmpretrain's transforms of each image, given the same offsets."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmman.datasets.batch_augmentation import crop_and_flip

PADDING = 4


@pytest.fixture
def images():
    return torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_equals_the_transforms_of_mmpretrain(images):
    transforms = pytest.importorskip('mmpretrain.datasets.transforms')
    from mmcv.transforms import RandomFlip

    offsets = torch.randint(2 * PADDING + 1, (len(images), 2), generator=torch.Generator().manual_seed(1))
    flip = torch.arange(len(images)) % 2 == 0
    rest = iter(offsets.tolist())

    class CropAtOffsets(transforms.RandomCrop):
        def rand_crop_params(self, img):
            return (*next(rest), 32, 32)

    crop, mirror = CropAtOffsets(crop_size=32, padding=PADDING), RandomFlip(prob=1.0, direction='horizontal')
    wanted = []
    for image, is_flipped in zip(images, flip, strict=True):
        results = crop({'img': image.permute(1, 2, 0).numpy(), 'img_shape': (32, 32)})
        results = mirror(results) if is_flipped else results
        wanted.append(torch.from_numpy(np.ascontiguousarray(results['img'])).permute(2, 0, 1))
    crops = crop_and_flip(images, *offsets.T, flip, PADDING)
    assert torch.equal(crops, torch.stack(wanted)) and crops.is_contiguous()


def preprocessor():
    init_default_scope('mmpretrain')
    stock = {'type': 'ClsDataPreprocessor', 'num_classes': 10, 'mean': [125.0, 123.0, 114.0], 'std': [51.0, 50.0, 52.0]}
    return MODELS.build({'type': 'mmman.BatchCropFlip', 'preprocessor': stock}), MODELS.build(stock)


def test_draws_follow_the_seed_and_validation_is_stock(images):
    pytest.importorskip('mmpretrain')
    batch, stock = preprocessor()
    torch.manual_seed(5)
    first, second = (batch({'inputs': images}, training=True)['inputs'] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(batch({'inputs': images}, training=True)['inputs'], first)
    assert not torch.equal(first, second)
    assert torch.equal(batch({'inputs': images})['inputs'], stock({'inputs': images})['inputs'])
    assert torch.equal(batch.mean, stock.mean)  # which heads that reconstruct the image read
    assert not hasattr(batch, 'no_such_attribute')


def test_a_list_of_images_is_refused(images):
    pytest.importorskip('mmpretrain')
    batch, _ = preprocessor()
    with pytest.raises(ValueError, match='collate_fn'):
        batch({'inputs': [*images]}, training=True)
