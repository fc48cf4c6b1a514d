_base_ = ['../../_base_/cifar10_paper.py', '../../_base_/resnet32_cifar.py']
