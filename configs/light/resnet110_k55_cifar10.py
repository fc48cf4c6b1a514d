_base_ = '../paper/_base_/cifar10_resnet32.py'

# Light local heads: of the next unit's copies the momentum copy alone. Not the paper's: accuracy at the paper's budget has not
# been measured.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=dict(_base_.model.backbone, depth=110),
        num_blocks=55,
        partition='uniform',
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    ),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
