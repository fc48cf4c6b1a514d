_base_ = './retinanet_r50_e2e_pretrained.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        transfer=dict(scale='release'),
        local_head=dict(
            type='mmman.DetLocalHead',
            bbox_head=_base_.model.bbox_head,
            train_cfg=_base_.model.train_cfg,
            size_filter=False,
            projection='release',
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', clip_scope='global')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
