_base_ = './deeplabv3plus_r50_e2e_pretrained.py'

model = dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))
paper = dict(table='V', mean_iou=75.53, mean_acc=83.24, overall_acc=95.84, memory_gb=34.42)
