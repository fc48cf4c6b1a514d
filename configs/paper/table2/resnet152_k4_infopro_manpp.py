_base_ = './resnet152_e2e.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        partition=['layer2.6', 'layer3.13', 'layer3.25'],
        local_head=dict(
            type='mmman.InfoProLocalHead',
            head=_base_.model.head,
            classifier='imagenet',
            lambda_rec=5.0,
            lambda_task=1.0,
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
paper = dict(error=21.28, error_top5=5.72)
