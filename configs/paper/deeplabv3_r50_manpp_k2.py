_base_ = ['mmseg::_base_/models/deeplabv3_r50-d8.py', '../_base_/cityscapes_paper.py']

# InfoPro's local head. The cut is the middle of layer3, as InfoPro's of ResNet-101: for ResNet-50 it is not given anywhere.
data_preprocessor = dict(size=_base_.crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=2,
        partition=['layer3.2'],
        local_head=dict(
            type='mmman.SegLocalHead',
            decode_head=_base_.model.decode_head,
            lambda_rec=1.5,
            lambda_task=1.0,
        ),
    ),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
