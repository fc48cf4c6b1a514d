_base_ = './resnet101_k4_infopro_manpp.py'

model = dict(backbone=dict(num_blocks=2, partition=['layer2.0']))
paper = dict(error=21.54, error_top5=5.41)
