_base_ = './stl10_resnet110_k32_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=24.08)
