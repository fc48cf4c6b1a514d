_base_ = './resnet152_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=21.45, error_top5=5.84)
