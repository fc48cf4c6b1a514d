_base_ = '../deeplabv3_r50_manpp_k2.py'

# Light local heads, and cuts and recomputed units as tools/fit_memory.py --blocks 2 --max-overhead 0.1 plans them for
# 16 images of 768x768. Not the paper's heads: accuracy at the paper's budget has not been measured.
model = dict(
    backbone=dict(
        partition=['layer3.3'],
        selective_recompute=['layer1', 'layer2', 'layer3', 'layer4'],
        transfer=dict(bias='depthwise'),
        local_head=dict(lambda_rec=0.0),
    )
)
optim_wrapper = dict(update='immediate')
