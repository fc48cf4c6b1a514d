_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

# UPerNet by MAN++, fine-tuned from ImageNet weights as the stock config does, in four blocks with light local heads. A block is
# a stage. The batch is the stock one, 2 images of 512x512 on each of 8 GPUs; tools/fit_memory.py plans cuts for it.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.SegLocalHead', decode_head=_base_.model.decode_head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
