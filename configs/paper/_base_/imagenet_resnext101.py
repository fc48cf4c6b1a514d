_base_ = ['../../_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnext101_32x8d.py']

# The paper's learning rate and batch: 64 images on each of 8 GPUs.
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=0.2))
auto_scale_lr = dict(base_batch_size=512)
