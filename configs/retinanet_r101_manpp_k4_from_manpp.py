_base_ = './retinanet_r101_manpp_k4.py'

# The backbone starts from what resnet101_manpp_k4_imagenet.py trained: its checkpoint as it is, or a published one.
model = dict(
    backbone=dict(
        backbone=dict(
            init_cfg=dict(
                type='Pretrained',
                checkpoint='work_dirs/resnet101_manpp_k4_imagenet/epoch_90.pth',
                prefix='backbone.',
            )
        )
    )
)
