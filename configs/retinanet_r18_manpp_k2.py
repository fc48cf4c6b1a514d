_base_ = './retinanet_r18_manpp_k4.py'

# In two blocks: all inputs of the pyramid are outputs of the second block, which the detector's own loss trains. On held-out
# images this form came closest to end-to-end training (docs/results.md). Cut and recomputed units for 8 images of 416x640.
model = dict(
    backbone=dict(num_blocks=2, partition=['layer2.0'], recompute=['stem', 'layer1', 'layer2', 'layer3']),
)
