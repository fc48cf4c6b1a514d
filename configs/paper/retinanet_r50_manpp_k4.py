_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=dict(_base_.model.backbone, frozen_stages=-1),
        num_blocks=4,
        local_head=dict(
            type='mmman.DetLocalHead',
            bbox_head=_base_.model.bbox_head,
            train_cfg=_base_.model.train_cfg,
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
