_base_ = './vit-tiny_k4_manpp.py'

model = dict(backbone=dict(num_blocks=6))
paper = dict(error=35.51, error_top5=14.64)
