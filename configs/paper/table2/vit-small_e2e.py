_base_ = '../../_base_/vit_imagenet_paper.py'

model = dict(backbone=dict(arch='deit-small'), head=dict(in_channels=384))
paper = dict(table='II', error=37.38, error_top5=17.32)
