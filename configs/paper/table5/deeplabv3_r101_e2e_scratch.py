_base_ = './deeplabv3_r101_e2e_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=56.74, mean_acc=65.51, overall_acc=92.67, memory_gb=30.91)
