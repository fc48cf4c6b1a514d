_base_ = './svhn_resnet32_k16_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=5.19)
