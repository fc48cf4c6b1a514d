_base_ = './deeplabv3_r50_e2e_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=59.71, mean_acc=68.09, overall_acc=93.34, memory_gb=23.90)
