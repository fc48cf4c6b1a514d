_base_ = './vgg13_e2e.py'

# One convolution a block; DGL's original head, as the row without a transfer is DGL's own. mmpretrain's VGG has its linear
# layers in the backbone, so the head doesn't say num_classes.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=10,
        partition='uniform',
        local_head=dict(
            type='mmman.DGLLocalHead',
            head=dict(type='LinearClsHead', num_classes=1000, loss=_base_.model.head.loss, topk=_base_.model.head.topk),
            original=True,
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
paper = dict(error=30.93, error_top5=10.24)
