_base_ = '../table1/cifar10_resnet32_k16_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(bias=False, scale=False)))
paper = dict(table='VII a', error=11.07)
