_base_ = './resnet110_cifar.py'

# The stem, then one residual block each. A row adds its local_head, and the optim wrapper to its recipe.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=55,
        partition='uniform',
    )
)
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
