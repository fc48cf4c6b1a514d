_base_ = './resnet101_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=21.73, error_top5=5.81)
