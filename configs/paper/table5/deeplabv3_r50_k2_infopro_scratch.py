_base_ = './deeplabv3_r50_k2_infopro_manpp_scratch.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=59.07, mean_acc=68.02, overall_acc=93.26, memory_gb=20.71)
