_base_ = './cascade-rcnn_r50_manpp_k2_finetune.py'

# Cut and recomputed units as tools/fit_memory.py --blocks 2 --max-overhead 0.15 plans them for Faster R-CNN R101.
model = dict(
    backbone=dict(
        backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
        partition=['layer3.16'],
        recompute=[*(f'layer3.{i}' for i in range(17, 23)), 'layer4'],
        selective_recompute=['layer2', *(f'layer3.{i}' for i in range(17))],
    )
)
