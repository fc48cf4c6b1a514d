_base_ = './resnet110_cifar.py'

# The cuts of the authors' code. A row adds its local_head, and the optim wrapper to its recipe.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=32,
        partition=[
            *(f'layer1.{i}' for i in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
            *(f'layer2.{i}' for i in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
            *(f'layer3.{i}' for i in (1, 3, 4, 6, 7, 9, 11, 13, 15)),
        ],
    )
)
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
