_base_ = ['mmseg::_base_/models/deeplabv3plus_r50-d8.py', './_base_/cityscapes_paper.py']

# DeepLabV3+ by MAN++, in two blocks with a light local head, by the paper's recipe: 16 crops of 768x768 on each of 8 GPUs.
# Every stage is trained, from mmseg's ImageNet weights; from scratch with --cfg-options model.pretrained=None.
# Cut and recomputed units as tools/fit_memory.py --blocks 2 --max-overhead 0.12 plans them for that. The paper's head
# is larger: configs/paper/.
data_preprocessor = dict(size=_base_.crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=2,
        partition=['layer3.4'],
        selective_recompute=['layer3.5', 'layer4'],
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.SegLocalHead', decode_head=_base_.model.decode_head),
    ),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
