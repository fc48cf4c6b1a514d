_base_ = ['./_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnext101_32x8d.py']

# ResNeXt-101 32x8d by MAN++, in four blocks with light local heads, from scratch by the paper's recipe: 64 images of 224x224 on
# each of 8 GPUs. The cuts are those with the smallest peak for that. tools/fit_memory.py --max-overhead 0.1 finds some that
# recompute units, and take less memory and more time. The paper's heads are larger: configs/paper/.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        partition=['layer1.1', 'layer2.2', 'layer3.9'],
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate', optimizer=dict(lr=0.2))
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]

# The paper's learning rate and batch.
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)
