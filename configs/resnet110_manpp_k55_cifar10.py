_base_ = ['./_base_/cifar10_paper.py', './_base_/resnet110_cifar_k55.py']

# ResNet-110 by MAN++, in 55 blocks of one unit with light local heads, from scratch by the paper's recipe: 1,024 images of
# 32x32 on one GPU. Blocks of one unit spend most of their FLOPs in local heads. The paper's heads are larger: configs/paper/.
model = dict(
    backbone=dict(
        transfer=dict(bias='depthwise'),
        local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head),
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', update='immediate')
