_base_ = './vit-base_e2e.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        local_head=dict(type='mmman.ViTLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
paper = dict(error=38.9, error_top5=19.29)
