_base_ = './vit-tiny_manpp_k6_imagenet.py'

model = dict(
    backbone=dict(backbone=dict(arch='base'), local_head=dict(head=dict(in_channels=768))),
    head=dict(in_channels=768),
)
