_base_ = './retinanet_r101_manpp_k4.py'

# Fine-tuned as the stock config does: stem and layer1 stay frozen, and the four blocks are of what is trained. The cuts balance
# them for 8 images of 416x640.
model = dict(
    backbone=dict(
        backbone=dict(frozen_stages=1),
        partition=['layer2.3', 'layer3.10', 'layer3.20'],
        recompute=['layer3.21', 'layer3.22', 'layer4'],
        selective_recompute=['layer2', *[f'layer3.{i}' for i in range(21)]],
    )
)
