_base_ = '../deeplabv3plus_r101_manpp_k2.py'

paper = dict(table='V', mean_iou=76.77, mean_acc=84.01, overall_acc=95.89)
