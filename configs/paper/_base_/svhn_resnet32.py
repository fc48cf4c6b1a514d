_base_ = './cifar10_resnet32.py'

# The recipe is CIFAR-10's. Not given in the paper: that train is without extra; crop and normalisation (the authors' code).
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=2),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmman.TorchvisionDataset',
        dataset='SVHN',
        data_root='data/svhn',
        split='train',
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmman.TorchvisionDataset',
        dataset='SVHN',
        data_root='data/svhn',
        split='test',
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
