_base_ = './resnet32_cifar.py'

model = dict(backbone=dict(depth=110))
