_base_ = '../retinanet_r152_manpp_k4_lean.py'

# Light local heads, and cuts and recomputed units as tools/fit_memory.py --blocks 4 --max-overhead 0.1 plans them for
# 8 images of 416x640. Not the paper's heads: accuracy at the paper's budget has not been measured.
model = dict(
    backbone=dict(
        partition=['layer2.0', 'layer3.4', 'layer3.22'],
        recompute=['stem'],
        selective_recompute=['layer1', 'layer2', 'layer3', 'layer4'],
        transfer=dict(bias='channel'),
        local_head=dict(stacked_convs=1, downsample=4, bbox_head=dict(feat_channels=128)),
    )
)
optim_wrapper = dict(images_per_chunk=2)  # as in the plan: one at a time would only take more time
