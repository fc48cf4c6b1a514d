_base_ = './deeplabv3plus_r101_k2_infopro_manpp_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=59.31, mean_acc=67.12, overall_acc=93.21)
