_base_ = '../table2/resnet101_k4_infopro_manpp.py'

paper = dict(table='VII b', error=21.66, error_top5=5.72)
