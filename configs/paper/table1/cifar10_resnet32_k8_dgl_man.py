_base_ = './cifar10_resnet32_k8_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=8.42)
