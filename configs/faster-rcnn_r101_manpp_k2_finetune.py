_base_ = './faster-rcnn_r50_manpp_k2_finetune.py'

# The deeper layer3 is cut near its middle, and the first block is recomputed as well, selectively.
model = dict(
    backbone=dict(
        backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
        partition=['layer3.16'],
        recompute=[*(f'layer3.{i}' for i in range(17, 23)), 'layer4'],
        selective_recompute=['layer2', *(f'layer3.{i}' for i in range(17))],
    )
)
