_base_ = './_base_/vit_imagenet_paper.py'

# ViT-Tiny by MAN++, in six blocks of two layers with light local heads (of a layer's copy the class token alone, and no further
# layer), from scratch by the paper's recipe: 128 images of 224x224 on each of 8 GPUs. With the first layer of each block
# recomputed, recompute=[f'layers.{i}' for i in range(0, 12, 2)], it takes less memory and more time. The paper's heads are
# larger: configs/paper/.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=6,
        transfer=dict(bias='channel'),
        local_head=dict(type='mmman.ViTLocalHead', head=_base_.model.head, layers=0),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
