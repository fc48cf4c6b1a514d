_base_ = './stl10_resnet32_k8_infopro_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=23.17)
