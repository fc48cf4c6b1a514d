_base_ = '../deeplabv3_r101_manpp_k2.py'

# Light local heads, and cuts and recomputed units by tools/plan_blocks.py --blocks 2 --max-overhead 0.2 --recompute
# for 16 images of 768x768. Not the paper's heads: accuracy has not been measured.
model = dict(
    backbone=dict(
        partition=['layer3.21'],
        recompute=['layer1', 'layer2', *[f'layer3.{i}' for i in range(22)]],
        transfer=dict(bias='channel'),
        local_head=dict(lambda_rec=0.0),
    )
)
optim_wrapper = dict(update='immediate')
