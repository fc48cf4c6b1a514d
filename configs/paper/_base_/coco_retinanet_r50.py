_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

# The paper's COCO recipe: every stage is trained, by Adam, with 8 images on each of 8 GPUs, for 100 epochs.
# Its MAN++ backbones trained on ImageNet are not public: the pre-trained rows start from torchvision's weights.
model = dict(backbone=dict(frozen_stages=-1))
train_dataloader = dict(batch_size=8, num_workers=4)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=4e-4))
auto_scale_lr = dict(base_batch_size=64)

# Not given in the paper: image scale (mmdet's 1333x800), weight decay (none), learning rate steps (mmdet's 1x, scaled).
max_epochs = 100
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[67, 92], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=3))
