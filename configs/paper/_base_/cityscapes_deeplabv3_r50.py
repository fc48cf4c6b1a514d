_base_ = ['mmseg::_base_/models/deeplabv3_r50-d8.py', '../../_base_/cityscapes_paper.py']

data_preprocessor = dict(size=_base_.crop_size)
model = dict(data_preprocessor=data_preprocessor)
