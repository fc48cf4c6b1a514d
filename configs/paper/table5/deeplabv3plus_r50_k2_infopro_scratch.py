_base_ = './deeplabv3plus_r50_k2_infopro_manpp_scratch.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=56.58, mean_acc=65.69, overall_acc=92.84, memory_gb=22.67)
