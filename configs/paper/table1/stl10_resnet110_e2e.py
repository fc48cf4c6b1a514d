_base_ = ['../../_base_/stl10_paper.py', '../../_base_/resnet110_cifar.py']

paper = dict(table='I', error=19.67)
