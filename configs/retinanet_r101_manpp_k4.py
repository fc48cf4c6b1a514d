_base_ = './retinanet_r50_manpp_k4.py'

# Cuts and recomputed units as tools/fit_memory.py --frozen-stages -1 --blocks 4 --max-overhead 0.1 plans them for 8 images of
# 416x640.
model = dict(
    backbone=dict(
        backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
        partition=['layer2.0', 'layer3.8', 'layer3.18'],
        recompute=['stem', 'layer1', 'layer2.0'],
        selective_recompute=['layer2.1', 'layer2.2', 'layer2.3', *[f'layer3.{i}' for i in range(19)]],
    )
)
optim_wrapper = dict(images_per_chunk=2)  # as in the plan: one at a time would only take more time
