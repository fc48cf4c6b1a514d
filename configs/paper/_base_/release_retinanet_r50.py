# RetinaNet as the authors' code trains it. Its batch of 16, 90k iterations, and learning rate of 0.01, divided by 10 after 60k
# and 80k, are mmdet's 90k schedule.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_90k_coco.py'

custom_imports = dict(imports=['mmman.heads.release_retina'])
model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False),
    bbox_head=dict(
        type='mmman.ReleaseRetinaHead',
        anchor_generator=dict(center_offset=0.5),
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0),
    ),
    train_cfg=dict(assigner=dict(match_low_quality=False)),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = [_base_.param_scheduler[1]]  # without warm-up

scale = (1000, 600)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
