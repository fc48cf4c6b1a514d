_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'

# Cascade R-CNN by MAN++, fine-tuned from ImageNet weights as the stock config does: stem and layer1 stay frozen.
# Two blocks of what is trained, with light local heads (RetinaNet's), cut where the flagship of Faster R-CNN is. The last block
# is recomputed. The batch is the stock one, 2 images on each of 8 GPUs; for another one plan cuts with tools/fit_memory.py.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=2,
        partition=['layer3.4'],
        recompute=['layer3.5', 'layer4'],
        transfer=dict(bias='channel'),
        local_head=dict(
            type='mmman.DetLocalHead',
            num_classes=_base_.model.roi_head.bbox_head[0].num_classes,
            stacked_convs=1,
            downsample=4,
        ),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
