_base_ = './deeplabv3plus_r101_e2e_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=58.23, mean_acc=66.51, overall_acc=93.14, memory_gb=34.42)
