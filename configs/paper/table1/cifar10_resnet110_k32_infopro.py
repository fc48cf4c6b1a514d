_base_ = './cifar10_resnet110_k32_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=12.26)
