_base_ = './deeplabv3_r50_manpp_k2.py'

# InfoPro's cut.
model = dict(
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(backbone=dict(depth=101), partition=['layer3.12']),
)
