_base_ = './cifar10_resnet110_k55_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=9.73)
