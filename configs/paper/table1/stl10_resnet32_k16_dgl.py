_base_ = './stl10_resnet32_k16_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=27.14)
