_base_ = '../table2/resnet101_k4_infopro.py'

paper = dict(table='VII b', error=22.81, error_top5=6.54)
