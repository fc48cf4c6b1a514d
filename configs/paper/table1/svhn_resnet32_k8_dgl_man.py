_base_ = './svhn_resnet32_k8_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=3.8)
