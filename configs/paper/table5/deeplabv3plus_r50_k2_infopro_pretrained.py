_base_ = './deeplabv3plus_r50_k2_infopro_manpp_pretrained.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=72.48, mean_acc=80.15, overall_acc=95.41, memory_gb=22.67)
