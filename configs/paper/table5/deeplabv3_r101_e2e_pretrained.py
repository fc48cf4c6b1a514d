_base_ = './deeplabv3_r50_e2e_pretrained.py'

model = dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))
paper = dict(table='V', mean_iou=74.41, mean_acc=82.31, overall_acc=95.51, memory_gb=30.91)
