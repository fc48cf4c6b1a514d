_base_ = '../paper/table2/resnet152_e2e.py'

# Light local heads, and cuts and recomputed units by tools/plan_blocks.py --blocks 4 --max-overhead 0.1 --recompute
# for 128 images of 224x224. Not the paper's heads: accuracy has not been measured.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=4,
        partition=['layer2.2', 'layer3.4', 'layer3.19'],
        recompute=['stem', 'layer1', 'layer2.0', 'layer2.1', 'layer2.2'],
        transfer=dict(bias='channel'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
paper = dict(_delete_=True)
