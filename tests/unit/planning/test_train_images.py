"""The number and the size of the training images, from configs of the kinds that the libraries have."""

import pytest
from mmengine.config import Config

from mmman.errors import ConfigError
from mmman.planning.train_images import image_size, images_per_step

RESIZE = {'type': 'Resize', 'scale': (1333, 800), 'keep_ratio': True}
DETR = [[{'type': 'RandomChoiceResize', 'scales': [(480, 1333), (800, 1333)], 'keep_ratio': True}], [RESIZE]]


def config(*pipeline, preprocessor=None, wrapped=False, batch=2):
    dataset = {'pipeline': [{'type': 'LoadImageFromFile'}, *pipeline]}
    dataset = {'type': 'RepeatDataset', 'dataset': dataset} if wrapped else dataset
    model = {'data_preprocessor': preprocessor or {}}
    return Config({'model': model, 'train_dataloader': {'batch_size': batch, 'dataset': dataset}})


@pytest.mark.parametrize(
    ('scope', 'pipeline', 'preprocessor', 'expected'),
    [
        ('mmdet', [RESIZE], {'pad_size_divisor': 32}, (800, 1344)),
        ('mmdet', [{'type': 'RandomChoice', 'transforms': DETR}], {}, (800, 1344)),
        ('mmdet', [{'type': 'RandomChoiceResize', 'scales': [640, 800], 'max_size': 1333}], {}, (800, 1344)),
        ('mmdet', [{**RESIZE, 'type': 'mmdet.RandomResize', 'scale': [(1333, 640), (1333, 800)]}], {}, (800, 1344)),
        ('mmdet', [{'type': 'Mosaic', 'img_scale': (640, 640)}, {'type': 'Pad', 'size': (640, 704)}], {}, (704, 640)),
        ('mmdet', [RESIZE, {'type': 'RandomCrop', 'crop_size': (640, 512)}], {}, (512, 640)),
        ('mmdet', [RESIZE, {'type': 'RandomCrop', 'crop_size': (0.5, 0.5), 'crop_type': 'relative'}], {}, (800, 1344)),
        ('mmdet', [RESIZE], {'batch_augments': [{'type': 'BatchFixedSizePad', 'size': (1024, 1024)}]}, (1024, 1024)),
        ('mmdet', [RESIZE], {'batch_augments': [{'random_size_range': (480, 800)}]}, (800, 800)),
        ('mmseg', [{'type': 'RandomCrop', 'crop_size': (512, 1024)}], {}, (512, 1024)),
        ('mmseg', [RESIZE], {'size': (512, 1024)}, (512, 1024)),
        ('mmpretrain', [{'type': 'RandomResizedCrop', 'scale': 224}], {}, (224, 224)),
        ('mmpretrain', [{'type': 'EfficientNetRandomCrop', 'scale': 240}], {}, (240, 240)),
        ('mmpretrain', [{'type': 'RandomCrop', 'crop_size': 32, 'padding': 4}], {}, (32, 32)),
    ],
)
def test_image_size(scope, pipeline, preprocessor, expected):
    assert image_size(config(*pipeline, preprocessor=preprocessor), scope) == expected
    assert image_size(config(*pipeline, preprocessor=preprocessor, wrapped=True), scope) == expected


def test_images_per_step():
    assert images_per_step(config(batch=7)) == 7


def test_errors_name_the_option():
    with pytest.raises(ConfigError, match='--shape H W'):
        image_size(config(), 'mmdet')
    with pytest.raises(ConfigError, match='--batch'):
        images_per_step(Config({'model': {}}))
