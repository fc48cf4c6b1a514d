_base_ = './mask-rcnn_r50_manpp_k2_finetune.py'

# As with ResNet-50, the cut is in front of the last unit of layer3.
model = dict(
    backbone=dict(
        backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
        partition=['layer3.21'],
        recompute=['layer3.22', 'layer4'],
    )
)
