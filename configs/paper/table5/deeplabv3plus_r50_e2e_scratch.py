_base_ = './deeplabv3plus_r50_e2e_pretrained.py'

model = dict(pretrained=None)
paper = dict(table='V', mean_iou=58.89, mean_acc=67.38, overall_acc=93.06, memory_gb=26.81)
