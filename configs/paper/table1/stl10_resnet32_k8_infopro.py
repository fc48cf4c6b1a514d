_base_ = './stl10_resnet32_k8_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(error=27.32)
