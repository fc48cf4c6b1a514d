_base_ = './svhn_resnet110_k55_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=5.36)
