_base_ = ['../../_base_/stl10_paper.py', '../../_base_/resnet32_cifar_k16.py']

model = dict(backbone=dict(local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head)))
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
paper = dict(table='I', error=21.08)
