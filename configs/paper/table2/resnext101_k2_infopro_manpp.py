_base_ = './resnext101_k4_infopro_manpp.py'

model = dict(backbone=dict(num_blocks=2, partition=['layer2.0']))
paper = dict(error=19.84, error_top5=5.01)
