_base_ = '../deeplabv3_r101_manpp_k2.py'

paper = dict(table='V', mean_iou=74.57, mean_acc=82.69, overall_acc=95.53)
