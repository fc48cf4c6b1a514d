_base_ = '../deeplabv3plus_r50_manpp_k2.py'

paper = dict(table='V', mean_iou=75.34, mean_acc=82.19, overall_acc=95.69)
