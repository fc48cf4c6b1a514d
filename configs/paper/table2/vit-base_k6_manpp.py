_base_ = './vit-base_k4_manpp.py'

model = dict(backbone=dict(num_blocks=6))
paper = dict(error=39.03, error_top5=19.52)
