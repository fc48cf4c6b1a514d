_base_ = './resnet101_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=21.65, error_top5=5.49)
