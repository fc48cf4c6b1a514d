_base_ = '../table1/cifar10_resnet32_k16_dgl.py'

paper = dict(table='VII a', error=14.08)
