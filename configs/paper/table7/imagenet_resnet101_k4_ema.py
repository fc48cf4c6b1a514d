_base_ = '../table2/resnet101_k4_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(bias=False, scale=False)))
paper = dict(table='VII b', error=22.09, error_top5=6.07)
