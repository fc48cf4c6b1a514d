# The E2E errors are those of torchvision's vgg13_bn, to two decimals: the VGG-13 with BN.
_base_ = ['../../_base_/imagenet_paper.py', 'mmpretrain::_base_/models/vgg13bn.py']

# The paper's learning rate and batch: 64 images on each of 8 GPUs.
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=0.2))
auto_scale_lr = dict(base_batch_size=512)
