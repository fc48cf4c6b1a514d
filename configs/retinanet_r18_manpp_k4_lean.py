_base_ = './retinanet_r18_manpp_k4.py'

# Less memory for more time: units and stem computed again, neck and dense heads image by image, blocks that step at once.
# The backbone doesn't return the output of layer1, which the stock neck skips. It trains the same.
model = dict(
    backbone=dict(
        backbone=dict(out_indices=(1, 2, 3)),
        recompute=['stem', 'layer1', 'layer2', 'layer3', 'layer4'],
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(images_per_chunk=1, update='immediate')
