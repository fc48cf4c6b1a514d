_base_ = './svhn_resnet110_k55_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=4.99)
