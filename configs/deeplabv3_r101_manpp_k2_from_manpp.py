_base_ = './deeplabv3_r101_manpp_k2.py'

# The backbone starts from what resnet101_manpp_k4_imagenet.py trained: its checkpoint as it is, or a published one. That has
# the plain stem, one 7x7 convolution, where mmseg's ResNetV1c has three: so has the segmentor here.
model = dict(
    pretrained=None,
    backbone=dict(
        backbone=dict(
            type='ResNet',
            init_cfg=dict(
                type='Pretrained',
                checkpoint='work_dirs/resnet101_manpp_k4_imagenet/epoch_90.pth',
                prefix='backbone.',
            ),
        )
    ),
)
