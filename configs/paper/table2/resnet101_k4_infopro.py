_base_ = './resnet101_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=22.81, error_top5=6.54)
