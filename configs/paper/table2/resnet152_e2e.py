_base_ = ['../../_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnet152.py']

paper = dict(table='II', error=21.6, error_top5=5.92)
