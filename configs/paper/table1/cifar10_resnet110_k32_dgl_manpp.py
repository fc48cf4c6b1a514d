_base_ = ['../../_base_/cifar10_paper.py', '../../_base_/resnet110_cifar_k32.py']

model = dict(backbone=dict(local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head)))
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
paper = dict(table='I', error=9.05)
