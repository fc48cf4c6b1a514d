_base_ = './deeplabv3plus_r50_k2_infopro_manpp_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=60.04, mean_acc=68.25, overall_acc=93.18)
