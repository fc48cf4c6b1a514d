_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'

# The CIFAR ResNet-32 in 16 blocks: the stem, then one residual block each; DGL's local head.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=dict(type='mmman.CIFARResNet', depth=32),
        num_blocks=16,
        partition='uniform',
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    ),
    head=dict(in_channels=64),
)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]

# The paper's recipe, on one GPU.
max_epochs = 400
train_dataloader = dict(batch_size=1024)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', optimizer=dict(lr=0.8, nesterov=True))
auto_scale_lr = dict(base_batch_size=1024)
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, begin=0, end=max_epochs)
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(checkpoint=dict(interval=10))
