_base_ = './deeplabv3plus_r101_k2_infopro_manpp_pretrained.py'

model = dict(backbone=dict(transfer=dict(ema=False, bias=False, scale=False)))
paper = dict(table='V', mean_iou=71.28, mean_acc=79.30, overall_acc=94.93, memory_gb=27.55)
