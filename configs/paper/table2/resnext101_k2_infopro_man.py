_base_ = './resnext101_k2_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=20.11, error_top5=5.18)
