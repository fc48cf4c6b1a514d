_base_ = ['../../_base_/svhn_paper.py', '../../_base_/resnet110_cifar.py']

paper = dict(table='I', error=2.92)
