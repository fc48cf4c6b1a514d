_base_ = './retinanet_r50_manpp_k4.py'

# Less memory for more time: small blocks where maps are large, units computed again, neck and heads image by image, and
# blocks that step at once. Gradients are those of the same cuts without these options.
model = dict(
    backbone=dict(
        partition=['stem', 'layer1.2', 'layer2.3'],
        recompute=['stem', 'layer1', 'layer2', 'layer3', 'layer4'],
    )
)
optim_wrapper = dict(images_per_chunk=1, update='immediate')
