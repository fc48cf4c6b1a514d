_base_ = '../../_base_/retinanet_coco_paper.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
