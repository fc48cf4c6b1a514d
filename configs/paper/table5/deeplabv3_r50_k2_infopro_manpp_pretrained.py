_base_ = '../deeplabv3_r50_manpp_k2.py'

paper = dict(table='V', mean_iou=73.85, mean_acc=81.24, overall_acc=95.31)
