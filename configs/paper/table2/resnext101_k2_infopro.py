_base_ = './resnext101_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=20.35, error_top5=5.28)
