_base_ = './vgg13_k10_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=35.6, error_top5=14.2)
