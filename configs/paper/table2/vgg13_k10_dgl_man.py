_base_ = './vgg13_k10_dgl_manpp.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(error=31.99, error_top5=10.84)
