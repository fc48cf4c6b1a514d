_base_ = './svhn_resnet32_k8_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=4.83)
