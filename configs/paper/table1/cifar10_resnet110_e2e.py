_base_ = ['../../_base_/cifar10_paper.py', '../../_base_/resnet110_cifar.py']

paper = dict(table='I', error=5.42)
