_base_ = './deeplabv3_r50_manpp_k2.py'

# Cut and recomputed units as tools/fit_memory.py --blocks 2 --max-overhead 0.1 plans them for 16 images of 768x768.
model = dict(
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(
        backbone=dict(depth=101),
        partition=['layer3.12'],
    ),
)
