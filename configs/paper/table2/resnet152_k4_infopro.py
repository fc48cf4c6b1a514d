_base_ = './resnet152_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=22.93, error_top5=6.71)
