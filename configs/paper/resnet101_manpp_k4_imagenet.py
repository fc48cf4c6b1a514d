_base_ = 'mmpretrain::resnet/resnet101_8xb32_in1k.py'

# Four blocks of about the same memory, the last units of the first three by name; InfoPro's local head.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        partition=['layer2.2', 'layer3.8', 'layer3.16'],
        local_head=dict(
            type='mmman.InfoProLocalHead',
            head=_base_.model.head,
            classifier='imagenet',
            lambda_rec=5.0,
            lambda_task=0.75,
        ),
    )
)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]

# The paper's recipe, on 8 GPUs.
max_epochs = 90
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', optimizer=dict(lr=0.4, nesterov=True))
auto_scale_lr = dict(base_batch_size=1024)
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, begin=0, end=max_epochs)
train_cfg = dict(max_epochs=max_epochs)
