_base_ = './deeplabv3_r101_k2_infopro_manpp_pretrained.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=70.94, mean_acc=79.79, overall_acc=95.19, memory_gb=25.02)
