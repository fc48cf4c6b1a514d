_base_ = ['../_base_/cifar10_paper.py', '../_base_/resnet110_cifar_k55.py']

# Light local heads: of the next unit's copies the momentum copy alone. Not the paper's: accuracy at the paper's budget has not
# been measured.
model = dict(
    backbone=dict(
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
