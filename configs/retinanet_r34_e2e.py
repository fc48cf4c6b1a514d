_base_ = './retinanet_r18_e2e.py'

model = dict(backbone=dict(depth=34, init_cfg=dict(checkpoint='torchvision://resnet34')))
