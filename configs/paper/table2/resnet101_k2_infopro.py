_base_ = './resnet101_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=21.85, error_top5=5.89)
