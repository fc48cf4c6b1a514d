_base_ = './svhn_resnet110_k32_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=5.89)
