_base_ = './resnext101_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=20.37, error_top5=5.34)
