_base_ = './resnet152_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=21.23, error_top5=5.53)
