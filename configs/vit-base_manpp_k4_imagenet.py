_base_ = 'mmpretrain::deit/deit-base_16xb64_in1k.py'

# Four blocks of three layers; the local heads take Mixup and CutMix targets and label smoothing from the model's head.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        local_head=dict(type='mmman.ViTLocalHead', head=_base_.model.head),
    )
)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]

# What the paper says of its recipe, on 8 GPUs; augmentation, warm-up and clipping are DeiT's.
max_epochs = 100
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    type='mmman.LocalLearningOptimWrapper',
    optimizer=dict(type='Adam', lr=1e-3, weight_decay=0.0),
)
auto_scale_lr = dict(base_batch_size=1024)
train_cfg = dict(max_epochs=max_epochs)
