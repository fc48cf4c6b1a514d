_base_ = './resnet152_k4_infopro_manpp.py'

model = dict(backbone=dict(num_blocks=2, partition=['layer2.5']))
paper = dict(error=20.81, error_top5=5.41)
