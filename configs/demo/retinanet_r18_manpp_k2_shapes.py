_base_ = './retinanet_r18_e2e_shapes.py'

# Two blocks. The first, up to the first unit of layer2, learns from a light detection head of its own. All inputs of the
# pyramid are left to the second, which the detector's loss trains.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        # without the output of layer1, which the stock neck skips
        backbone=dict(_base_.model.backbone, out_indices=(1, 2, 3)),
        num_blocks=2,
        partition=['layer2.0'],
        recompute=['stem', 'layer3'],
        transfer=dict(bias='channel'),
        local_head=dict(
            type='mmman.DetLocalHead',
            bbox_head=dict(_base_.model.bbox_head, feat_channels=32),
            train_cfg=_base_.model.train_cfg,
            stacked_convs=1,
            downsample=2,  # of four, the finest anchors would be too large for most of the shapes
        ),
    ),
    neck=dict(in_channels=[32, 64, 128], start_level=0),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate', images_per_chunk=2)
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
