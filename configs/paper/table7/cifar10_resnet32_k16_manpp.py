_base_ = '../table1/cifar10_resnet32_k16_dgl_manpp.py'

paper = dict(table='VII a', error=8.75)
