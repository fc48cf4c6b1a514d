_base_ = ['../../_base_/svhn_paper.py', '../../_base_/resnet110_cifar_k55.py']

model = dict(
    backbone=dict(
        local_head=dict(
            type='mmman.InfoProLocalHead',
            head=_base_.model.head,
            classifier='1c2f',
            lambda_rec=(5.0, 0.0),
            lambda_task=(0.5, 0.0),
        )
    )
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
paper = dict(table='I', error=4.27)
