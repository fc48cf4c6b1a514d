_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

# RetinaNet by MAN++, in four blocks with light local heads. Every stage is trained, from ImageNet weights. From scratch:
# --cfg-options model.backbone.backbone.init_cfg=None model.backbone.backbone.norm_eval=False
# Cuts and recomputed units as tools/fit_memory.py --frozen-stages -1 --blocks 4 --max-overhead 0.09 plans them for 8 images of
# 416x640; for another batch or size plan anew. The paper's heads are larger: configs/paper/.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        # without the output of layer1, which the stock neck skips
        backbone=dict(_base_.model.backbone, frozen_stages=-1, out_indices=(1, 2, 3)),
        num_blocks=4,
        partition=['layer1.1', 'layer2.1', 'layer3.1'],
        recompute=['stem', 'layer1'],
        transfer=dict(bias='channel'),
        local_head=dict(
            type='mmman.DetLocalHead',
            bbox_head=dict(_base_.model.bbox_head, feat_channels=128),
            train_cfg=_base_.model.train_cfg,
            stacked_convs=1,
            downsample=4,
        ),
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(
    type='mmman.LocalLearningOptimWrapper',
    update='immediate',
    images_per_chunk=2,  # planned for 1, which takes less memory and starts more kernels
)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]

# On 2 GPUs this is the stock batch of 16; on another number of GPUs add --auto-scale-lr.
train_dataloader = dict(batch_size=8)
