_base_ = './resnet152_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=21.59, error_top5=5.89)
