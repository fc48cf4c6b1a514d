_base_ = [
    'mmseg::_base_/datasets/cityscapes_768x768.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]

# The paper's Cityscapes recipe: 16 crops of 768x768 on each of 8 GPUs, SGD, 4,000 iterations. mmseg has no DeepLab for these
# crops: models are put together of its base configs, as its own are.
# MAN++ backbones trained on ImageNet are not public: the pre-trained rows start from mmseg's weights.
max_iters = 4000
train_dataloader = dict(batch_size=16, num_workers=8)
optimizer = dict(lr=0.8, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer)
auto_scale_lr = dict(base_batch_size=128)
train_cfg = dict(max_iters=max_iters, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2))

# Not given in the paper: the schedule (mmseg's poly, without warm-up), one learning rate for backbone and heads, augmentation,
# output stride, auxiliary head and whole images at test time (mmseg's).
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=max_iters, by_epoch=False)]
