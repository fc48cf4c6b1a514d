_base_ = './resnet32_cifar.py'

# InfoPro's cuts. A row adds its local_head, and the optim wrapper to its recipe.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=8,
        partition=['layer1.0', 'layer1.2', 'layer1.4', 'layer2.1', 'layer2.3', 'layer3.0', 'layer3.2'],
    )
)
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
