_base_ = './retinanet_r50_manpp_k4.py'

# Fine-tuned as the stock config does: stem and layer1 stay frozen, and the four blocks are of what is trained. The cuts balance
# them for 8 images of 416x640.
model = dict(
    backbone=dict(
        backbone=dict(frozen_stages=1),
        partition=['layer2.1', 'layer2.3', 'layer3.4'],
        recompute=['layer3.5', 'layer4'],
    )
)
optim_wrapper = dict(images_per_chunk=2)
