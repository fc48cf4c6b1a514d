_base_ = '../../_base_/vit_imagenet_paper.py'

model = dict(backbone=dict(arch='deit-tiny'), head=dict(in_channels=192))
paper = dict(table='II', error=35.59, error_top5=14.69)
