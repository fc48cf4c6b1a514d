_base_ = './deeplabv3_r101_k2_infopro_manpp_pretrained.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(_delete_=True, table='VI', memory_gb=25.41)
