_base_ = '../deeplabv3_r101_manpp_k2.py'

model = dict(backbone=dict(transfer=dict(bias='channel'), local_head=dict(lambda_rec=0.0)))
optim_wrapper = dict(update='immediate')
