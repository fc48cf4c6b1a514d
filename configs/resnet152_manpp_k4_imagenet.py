_base_ = ['./_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnet152.py']

# ResNet-152 by MAN++, in four blocks with light local heads, from scratch by the paper's recipe: 128 images of 224x224 on
# each of 8 GPUs. The cuts are those with the smallest peak for that. tools/fit_memory.py --max-overhead 0.1 finds some that
# recompute units, and take less memory and more time. The paper's heads are larger: configs/paper/.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        partition=['layer1.2', 'layer2.6', 'layer3.16'],
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
