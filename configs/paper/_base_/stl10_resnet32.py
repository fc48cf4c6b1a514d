_base_ = './cifar10_resnet32.py'

# CIFAR-10's recipe with the paper's batch and learning rate. Not given: crop, flip and normalisation (the authors' code).
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
train_pipeline = [
    dict(type='RandomCrop', crop_size=96, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type='mmman.TorchvisionDataset',
        dataset='STL10',
        data_root='data/stl10',
        split='train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type='mmman.TorchvisionDataset',
        dataset='STL10',
        data_root='data/stl10',
        split='test',
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.1))
param_scheduler = [dict(_base_.param_scheduler[0], start_factor=0.1), _base_.param_scheduler[1]]
auto_scale_lr = dict(base_batch_size=128)
