_base_ = './deeplabv3plus_r50_k2_infopro_manpp_pretrained.py'

model = dict(backbone=dict(transfer=dict(scale=False)))
paper = dict(_delete_=True, table='VI', memory_gb=23.29)
