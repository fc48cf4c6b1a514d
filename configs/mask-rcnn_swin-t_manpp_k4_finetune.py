_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

# Mask R-CNN by MAN++, fine-tuned from ImageNet weights as the stock config does, in four blocks with light local heads
# (RetinaNet's). A block is a stage: neck, RPN and RoI heads then take more memory than any block. The batch is the stock one,
# 2 images on each of 8 GPUs; for another one plan cuts with tools/fit_memory.py.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        transfer=dict(bias='channel'),
        local_head=dict(
            type='mmman.DetLocalHead',
            num_classes=_base_.model.roi_head.bbox_head.num_classes,
            stacked_convs=1,
            downsample=4,
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
