_base_ = './retinanet_r50_e2e_pretrained.py'

model = dict(backbone=dict(init_cfg=None))
