_base_ = '../table2/resnet101_k4_infopro_man.py'

paper = dict(table='VII b', error=21.73, error_top5=5.81)
