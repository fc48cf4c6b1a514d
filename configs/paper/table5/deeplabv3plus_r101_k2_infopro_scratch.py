_base_ = './deeplabv3plus_r101_k2_infopro_manpp_scratch.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=55.91, mean_acc=65.33, overall_acc=92.69, memory_gb=27.55)
