_base_ = './resnet110_cifar.py'

# Not given in the paper: the cuts (after every unit or two). A row adds its local_head, and the optim wrapper to its recipe.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=32,
        partition='uniform',
    )
)
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
