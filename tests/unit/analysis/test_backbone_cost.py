from dataclasses import astuple

import pytest
import torch

from mmman import localize_
from mmman.analysis import LiveBytes
from mmman.analysis.backbone_cost import Ratios, UnitCounts, formula_ratios, predict_cost, summed_ratios, unit_counts
from mmman.analysis.paper_cost import CHANNEL, UNIT, Bias
from mmman.errors import CostError
from tests.toy import ToyNet

SHAPE = (2, 3, 16, 16)
HEAD = {'type': 'mmman.ToyLocalHead'}


def localized(transfer=None, **options):
    net = ToyNet(**options)
    return localize_(net, 3, HEAD, partition='stage', transfer=transfer)


def test_unit_costs_are_what_arithmetic_says():
    big, small = 2 * 4 * 16 * 16, 2 * 8 * 8 * 8  # numbers in a feature map of stage 1 and of stage 2
    stem, first, second, third = unit_counts(localized(), SHAPE)[:4]
    # A convolution keeps its input, BatchNorm its input, a mean and a deviation a channel, a ReLU its result.
    assert stem == UnitCounts('stem', 4 * 27 + 4, 2 * big * 27, 0)
    assert first == UnitCounts('layer1.0', 4 * 36 + 8, 2 * big * 36, 4 * (3 * big + 8))  # with the stem's output
    assert second == UnitCounts('layer1.1', 4 * 36 + 8, 2 * big * 36, 4 * (2 * big + 8))
    assert third == UnitCounts('layer2.0', 8 * 36 + 16 + 8 * 4 + 8, 2 * small * (36 + 4), 4 * (2 * small + 16))


def kept_bytes(net):
    """What is alive after a real forward pass and wasn't before; the outputs are among what their ReLU keeps."""
    images = torch.randn(SHAPE)
    with LiveBytes(net, images) as live:
        before = live.current
        outputs = net(images)
    assert outputs
    return live.current - before


def test_meta_tensors_keep_what_a_real_forward_pass_keeps():
    net = localized()
    assert sum(unit.activations for unit in unit_counts(net, SHAPE)) == kept_bytes(net)


def test_a_checkpointed_backbone_of_mmpretrain():
    models = pytest.importorskip('mmpretrain.models')
    net = localize_(models.ResNet(18, with_cp=True), 1)
    with pytest.warns(UserWarning, match='use_reentrant'):
        assert sum(unit.activations for unit in unit_counts(net, SHAPE)) == kept_bytes(net)


def test_frozen_stages_and_norm_eval_of_mmdet():
    models = pytest.importorskip('mmdet.models')
    net = localize_(models.ResNet(18, out_indices=(3,), norm_eval=True, frozen_stages=1), 1)
    net.train()
    costs = unit_counts(net, SHAPE)
    # On meta tensors BatchNorm keeps a mean and a deviation a channel in eval mode as well.
    statistics = sum(8 * module.num_features for stage in (2, 3, 4) for module in batch_norms(net, f'layer{stage}'))
    assert sum(unit.activations for unit in costs) == kept_bytes(net) + statistics
    assert [unit.activations for unit in costs[:3]] == [0, 0, 0]


def batch_norms(net, path):
    return [module for module in net.get_submodule(path).modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_the_backbone_stays_as_it_is():
    net = localized().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    predict_cost(net, SHAPE)
    assert not net.training and len(net.local) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_eval_mode_does_not_change_what_training_costs():
    net = ToyNet()
    net.layer1[0].skip = torch.nn.Dropout()  # which keeps a mask of its input, in training only
    localize_(net, 1)
    plain, with_mask = unit_counts(localized(), SHAPE)[1], unit_counts(net.eval(), SHAPE)[1]
    assert with_mask.activations > plain.activations


def test_frozen_units_are_left_out():
    net = ToyNet()
    net.stem.requires_grad_(False)
    localize_(net, 3, {'type': 'mmman.ToyLocalHead'}, partition='stage')
    assert [unit.name for unit in predict_cost(net, SHAPE).blocks[0]] == ['layer1.0', 'layer1.1']


def test_formulas_of_a_backbone():
    """Seven units in three blocks: Eq. 8, 13 and 17 with L = 7, K = 3 and a second copy as bias."""
    found = predict_cost(localized(), SHAPE)
    assert [len(block) for block in found.blocks] == [3, 2, 2] and found.bias == UNIT
    expected = (1 + 2 * 2 / 7, 1 + 2 / 7 * 2, 1 / 3 + 2 / 7)
    assert (found.formulas.parameters, found.formulas.flops, found.formulas.activations) == pytest.approx(expected)


def test_summed_parameters_are_those_of_the_copies():
    net = localized()
    copies = sum(p.numel() for head in net.local.values() for copied in head.transfer.copies for p in copied.parameters())
    own = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.local.parameters())
    assert predict_cost(net, SHAPE).summed.parameters == pytest.approx(1 + copies / own)


def test_sums_over_unequal_units():
    blocks = [
        [UnitCounts('a', 1, 10, 70), UnitCounts('b', 2, 10, 10)],
        [UnitCounts('c', 5, 20, 40)],
        [UnitCounts('d', 12, 40, 80)],
    ]
    bias = Bias(parameters=1, flops=0.5, activations=0.25)
    # Heads: c on the first block, d on the second. Peaks: 80 + 1.25 * 40, 40 + 1.25 * 80, 80.
    assert summed_ratios(blocks, bias) == Ratios(1 + 2 * 17 / 20, 1 + 1.25 * 60 / 80, 140 / 200)


def test_equal_units_and_blocks_give_the_formulas():
    blocks = [[UnitCounts('a', 3, 5, 7)] * 4] * 3
    summed = summed_ratios(blocks, CHANNEL)
    formulas = formula_ratios(blocks, CHANNEL)
    assert astuple(summed) == pytest.approx(astuple(formulas))


def test_biases():
    assert predict_cost(localized({'bias': 'depthwise'}), SHAPE).bias == CHANNEL
    assert predict_cost(localized({'bias': False, 'scale': False}), SHAPE).bias == Bias(0, 0, 0)
    with pytest.raises(CostError, match='set ema=True in transfer'):
        predict_cost(localized({'ema': False, 'bias': False, 'scale': False}), SHAPE)
    with pytest.raises(CostError, match="set source_unit='next' in transfer"):
        predict_cost(localize_(ToyNet(), 2, HEAD, partition=['layer1.0'], transfer={'source_unit': 'next_stage'}), SHAPE)


def test_one_block_costs_what_end_to_end_does():
    found = predict_cost(localize_(ToyNet(), 1), SHAPE)
    assert found.formulas == found.summed == Ratios(1, 1, 1)
