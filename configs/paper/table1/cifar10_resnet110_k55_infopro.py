_base_ = './cifar10_resnet110_k55_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=13.22)
