"""Segmentation: DeepLabV3 from scratch on CamVid, road scenes with eleven classes, laid out as Cityscapes."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from training_rows.task import CONFIGS, Metric, Recipe, RowSource, Task, loader, stock_backbone, warmup_and_cosine

CLASSES = (
    'road',
    'sidewalk',
    'building',
    'fence',
    'pole',
    'traffic sign',
    'vegetation',
    'sky',
    'person',
    'rider',
    'car',
)
"""CamVid's classes, by the names of the Cityscapes classes that stand for them."""

SIZE = (240, 180)  # width and height of the images, pixels
CROP = (128, 128)  # height and width of what is trained on, pixels

SOURCES = {
    'e2e': 'table5/deeplabv3_r50_e2e_scratch',
    'infopro': 'table5/deeplabv3_r50_k2_infopro_scratch',
    'manpp': 'table5/deeplabv3_r50_k2_infopro_manpp_scratch',
    'light': CONFIGS / 'deeplabv3_r50_manpp_k2.py',
}
RESNET18 = {
    'model.decode_head.in_channels': 512,
    'model.decode_head.channels': 128,
    'model.auxiliary_head.in_channels': 256,
    'model.auxiliary_head.channels': 64,
}
"""The heads of mmseg's deeplabv3_r18 models, which the paper has not."""

R18_CUT = {'model.backbone.backbone.depth': 18, 'model.backbone.partition': ['layer3.0']}
"""The middle of layer3, as with ResNet-50."""

ROWS = {
    name: RowSource(source, RESNET18 | ({'model.backbone.depth': 18} if name == 'e2e' else R18_CUT))
    for name, source in SOURCES.items()
} | {f'r50_{name}': RowSource(source) for name, source in SOURCES.items()}


def fit_model(cfg: Config) -> None:
    """Fit a DeepLab to the classes and the crops, without pre-trained weights."""
    model = cfg.model
    model.pretrained = None
    stock_backbone(cfg).init_cfg = None
    model.data_preprocessor.size = CROP
    heads = model.decode_head, model.auxiliary_head, model.backbone.get('local_head', {}).get('decode_head')
    for head in heads:
        if head is not None:
            head.num_classes = len(CLASSES)


def set_data(cfg: Config, root: Path) -> None:
    """Read CamVid: images are decoded and resized once, cropped and flipped at random in training.

    Validation is on whole images; predictions are compared at the images' full size.
    """
    load, annotations = {'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}
    resize = {'type': 'Resize', 'scale': SIZE, 'keep_ratio': True}
    pack = {'type': 'PackSegInputs'}
    pipelines = {
        'train': [
            {'type': 'mmman.KeepInMemory', 'transforms': [load, annotations, resize]},
            {'type': 'RandomCrop', 'crop_size': CROP, 'cat_max_ratio': 0.75},
            {'type': 'RandomFlip', 'prob': 0.5},
            pack,
        ],
        'val': [{'type': 'mmman.KeepInMemory', 'transforms': [load, resize, annotations]}, pack],
    }
    train, val = (
        {
            'type': 'CityscapesDataset',
            'data_root': str(root),
            'data_prefix': {'img_path': f'leftImg8bit/{split}', 'seg_map_path': f'gtFine/{split}'},
            'metainfo': {'classes': CLASSES},  # all other classes are ignored
            'pipeline': pipeline,
            'test_mode': split == 'val',
        }
        for split, pipeline in pipelines.items()
    )
    cfg.train_dataloader = loader(train, sampler='InfiniteSampler', shuffle=True)
    cfg.val_dataloader = loader(val, batch_size=4)
    cfg.val_evaluator = {'type': 'IoUMetric', 'iou_metrics': ['mIoU']}


TASK = Task(
    name='segmentation',
    rows=ROWS,
    metrics=(Metric('mIoU', 'mIoU, %'), Metric('aAcc', 'pixel accuracy, %')),
    recipe=Recipe(
        unit='iterations',
        length=400,
        validations=4,
        batch_size=8,
        optimizer={'type': 'Adam', 'lr': 4e-4, 'weight_decay': 0.0},
        schedule=warmup_and_cosine,
        clip_grad={'max_norm': 10.0, 'norm_type': 2},
    ),
    files=('leftImg8bit/train', 'leftImg8bit/val', 'gtFine/train', 'gtFine/val'),
    set_data=set_data,
    fit_model=fit_model,
)
