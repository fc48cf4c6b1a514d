_base_ = './retinanet_r50_manpp_k4.py'

# Cuts and recomputed units as tools/fit_memory.py --frozen-stages -1 --blocks 4 --max-overhead 0.1 plans them for 8 images of
# 416x640.
model = dict(
    backbone=dict(
        backbone=dict(depth=152, init_cfg=dict(checkpoint='torchvision://resnet152')),
        partition=['layer2.0', 'layer3.4', 'layer3.22'],
        recompute=['stem'],
        selective_recompute=['layer1', 'layer2', 'layer3', 'layer4'],
    )
)
optim_wrapper = dict(images_per_chunk=2)  # as in the plan: one at a time would only take more time
