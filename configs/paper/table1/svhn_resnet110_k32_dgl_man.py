_base_ = './svhn_resnet110_k32_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=4.08)
