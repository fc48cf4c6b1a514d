_base_ = './retinanet_r101_manpp_k4.py'

# Less memory for more time: units and stem computed again, neck and dense heads image by image, blocks that step at once.
# It trains the same.
model = dict(backbone=dict(recompute=['stem', 'layer1', 'layer2', 'layer3', 'layer4']))
optim_wrapper = dict(images_per_chunk=1, update='immediate')
