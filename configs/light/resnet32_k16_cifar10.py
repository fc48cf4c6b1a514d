_base_ = '../paper/table1/cifar10_resnet32_k16_dgl_manpp.py'

# Light local heads: of the next unit's copies the momentum copy alone. Not the paper's: accuracy at the paper's budget has not
# been measured.
model = dict(backbone=dict(transfer=dict(bias='depthwise')))
optim_wrapper = dict(update='immediate')
paper = dict(_delete_=True)
