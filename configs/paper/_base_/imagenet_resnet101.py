_base_ = ['../../_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnet101.py']
