_base_ = './deeplabv3_r50_k2_infopro_manpp_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=60.84, mean_acc=69.12, overall_acc=93.41)
