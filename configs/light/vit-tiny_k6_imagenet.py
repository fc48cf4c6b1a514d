_base_ = '../_base_/vit_imagenet_paper.py'

# Light local heads: of a layer's copy the class token alone, and no further layer. With recompute=[f'layers.{i}' for i in
# range(0, 12, 2)], of each block's two layers the first, they take less memory and more time. Not the paper's heads: accuracy
# at the paper's budget has not been measured.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=6,
        transfer=dict(bias='channel'),
        local_head=dict(type='mmman.ViTLocalHead', head=_base_.model.head, layers=0),
    ),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [dict(type='mmman.EMABiasHook', momentum=0.995)]
