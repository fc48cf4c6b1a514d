_base_ = './retinanet_r50_e2e_pretrained.py'

model = dict(backbone=dict(norm_cfg=dict(type='SyncBN'), norm_eval=False, init_cfg=None))
