_base_ = ['../../_base_/imagenet_paper.py', 'mmpretrain::_base_/models/resnet101.py']

paper = dict(table='II', error=22.03, error_top5=5.93)
