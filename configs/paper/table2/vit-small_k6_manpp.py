_base_ = './vit-small_k4_manpp.py'

model = dict(backbone=dict(num_blocks=6))
paper = dict(error=37.15, error_top5=17.19)
