_base_ = './retinanet_r18_manpp_k4.py'

# Cuts and recomputed units as tools/fit_memory.py --frozen-stages -1 --blocks 4 --max-overhead 0.1 plans them for 8 images of
# 416x640.
model = dict(
    backbone=dict(
        backbone=dict(depth=34, init_cfg=dict(checkpoint='torchvision://resnet34')),
        partition=['layer1.2', 'layer2.3', 'layer3.5'],
        recompute=['stem', 'layer1', 'layer4'],
        selective_recompute=['layer2'],
    )
)
# Two images a chunk, as in retinanet_r18_manpp_k4.py, start fewer kernels than the plan for one, for 1 % more bytes.
