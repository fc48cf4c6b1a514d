"""Detection: RetinaNets from scratch on BCCD, photographs of blood cells with three classes, in COCO's format."""

from __future__ import annotations

import math
from pathlib import Path

from mmengine.config import Config

from training_rows.task import CONFIGS, Metric, Recipe, RowSource, Task, loader, stock_backbone, warmup_and_cosine

CLASSES = 3
WIDTH = 64  # channels of the FPN and of the heads that have as many as the model's own
SIZE = (256, 192)  # width and height of the images, pixels

ROWS = {
    f'{prefix}{name}': RowSource(CONFIGS / path.format(depth))
    for prefix, depth in (('', 'r18'), ('r50_', 'r50'))
    for name, path in (
        ('e2e', 'paper/retinanet_{}_e2e.py'),
        ('manpp', 'paper/retinanet_{}_manpp_k4.py'),
        ('light', 'retinanet_{}_manpp_k4.py'),
    )
}


def fit_model(cfg: Config) -> None:
    """Fit a RetinaNet to the classes and the width, and train all of its backbone from scratch."""
    stock_backbone(cfg).update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    model = cfg.model
    own_width = model.bbox_head.feat_channels
    model.neck.out_channels = model.bbox_head.in_channels = WIDTH
    for head in (model.bbox_head, model.backbone.get('local_head', {}).get('bbox_head')):
        if head is not None:
            head.num_classes = CLASSES
            if head.feat_channels == own_width:
                head.feat_channels = WIDTH
                head.init_cfg = _init_cfg(own_width)


def _init_cfg(own_width: int) -> dict:
    """The head's own initialisation, with weights that give as large an output for WIDTH input channels as for ``own_width``.

    mmdet's standard deviation of 0.01 is made for 256 channels. With 64, four convolutions make the signal 16 times smaller
    still, and the levels that few images have an object on (P6, P7) may never learn anything.
    """
    classifier = {'type': 'Normal', 'name': 'retina_cls', 'std': 0.01, 'bias_prob': 0.01}
    return {'type': 'Normal', 'layer': 'Conv2d', 'std': 0.01 * math.sqrt(own_width / WIDTH), 'override': classifier}


def set_data(cfg: Config, root: Path) -> None:
    """Read BCCD: images are decoded and resized once, and flipped at random in training."""
    keep = {
        'type': 'mmman.KeepInMemory',
        'transforms': [
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True},
            {'type': 'Resize', 'scale': SIZE, 'keep_ratio': True},
        ],
    }
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = {'type': 'PackDetInputs', 'meta_keys': meta}
    pipelines = {'train': [keep, {'type': 'RandomFlip', 'prob': 0.5}, pack], 'val': [keep, pack]}
    train, val = (
        {
            'type': 'CocoDataset',
            'data_root': str(root),
            'ann_file': f'annotations/instances_{split}.json',
            'data_prefix': {'img': split},
            'metainfo': {'classes': ('RBC', 'WBC', 'Platelets')},
            'pipeline': pipeline,
            'test_mode': split == 'val',
        }
        for split, pipeline in pipelines.items()
    )
    cfg.train_dataloader = loader(train, sampler='InfiniteSampler', shuffle=True)
    cfg.val_dataloader = loader(val, batch_size=8)
    cfg.val_evaluator = {
        'type': 'CocoMetric',
        'ann_file': str(root / val['ann_file']),
        'metric': 'bbox',
        'format_only': False,
    }


TASK = Task(
    name='detection',
    rows=ROWS,
    metrics=(Metric('coco/bbox_mAP', 'mAP', 3), Metric('coco/bbox_mAP_50', 'AP50', 3)),
    recipe=Recipe(
        unit='iterations',
        length=750,
        validations=4,
        batch_size=8,
        optimizer={'type': 'Adam', 'lr': 4e-4, 'weight_decay': 0.0},
        schedule=warmup_and_cosine,
        clip_grad={'max_norm': 10.0, 'norm_type': 2},
    ),
    files=tuple(f'annotations/instances_{split}.json' for split in ('train', 'val')),
    set_data=set_data,
    fit_model=fit_model,
)
