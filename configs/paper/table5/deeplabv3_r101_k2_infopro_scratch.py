_base_ = './deeplabv3_r101_k2_infopro_manpp_scratch.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=55.23, mean_acc=64.23, overall_acc=92.39, memory_gb=25.02)
