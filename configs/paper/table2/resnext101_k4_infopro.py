_base_ = './resnext101_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=21.69, error_top5=6.11)
