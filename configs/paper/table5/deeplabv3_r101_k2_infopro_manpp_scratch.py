_base_ = './deeplabv3_r101_k2_infopro_manpp_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=58.54, mean_acc=67.11, overall_acc=93.05)
