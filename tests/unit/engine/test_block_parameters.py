"""Which block holds which tensor."""

from mmengine.registry import MODELS

from mmman.engine.block_parameters import block_index
from tests.toy import toy_config


def test_every_tensor_goes_with_a_block():
    model = MODELS.build(toy_config(num_blocks=3, partition=['layer1.0', 'layer2.1']))
    table = block_index(model)
    assert table['backbone.stem.weight'] == table['backbone.layer1.0.bn.running_mean'] == 0
    assert table['backbone.layer1.1.conv.weight'] == table['backbone.local.layer2_1.transfer.delta'] == 1
    assert table['backbone.local.layer1_0.transfer.momentum.conv.weight'] == 0
    assert table['backbone.layer3.0.conv.weight'] == table['head.0.weight'] == 2
    assert table.keys() >= model.state_dict().keys()
