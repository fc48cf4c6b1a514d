_base_ = '../../_base_/vit_imagenet_paper.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
paper = dict(table='II', error=39.18, error_top5=19.55)
