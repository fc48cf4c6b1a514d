"""The base class of local heads: boundaries without a session, weights along the depth, and the model's task."""

import pytest
import torch
from torch import nn

from mmman import LocalHead, delocalize_
from mmman.errors import ConfigError
from mmman.local.local_head import Boundary, drop_keys
from mmman.partition import Feature, Unit
from tests.toy import toy_batches
from tests.unit.local.test_session import toy


def test_without_a_session_nothing_changes_and_a_backward_is_refused():
    model = toy(num_blocks=3)
    batch = toy_batches(1)[0]
    losses = model(**batch, mode='loss')
    with pytest.raises(ConfigError, match=r'crossed the boundary after layer2.0 .*LocalLearningOptimWrapper.*delocalize_'):
        losses['loss_ce'].backward()
    assert all(p.grad is None for p in model.backbone.layer1.parameters())

    delocalize_(model.backbone)
    model(**batch, mode='loss')['loss_ce'].backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    single = toy(num_blocks=1)
    single(**batch, mode='loss')['loss_ce'].backward()


def test_a_boundary_returns_its_input_where_no_gradient_is_wanted():
    head = next(iter(toy().backbone.local.values()))
    head.session = object()  # which would raise if it were called
    with torch.no_grad():
        assert head.at_boundary(None, (), torch.ones(1)) is None


def boundary(block=1, num_blocks=5, unit='layer1', stage=1):
    return Boundary(
        block, num_blocks, unit, Unit.single('layer2', stage), Feature(4, 2), Feature(8, 4), False, (4,), next_stage=stage
    )


@pytest.mark.parametrize(('value', 'expected'), [(2.0, [2, 2, 2, 2, 2]), ((5.0, 2.0), [5, 4, 3, 2, 2])])
def test_weights_are_interpolated_linearly_by_stage(value, expected):
    """From the end of the stem on; never beyond the last value."""
    units = [('stem', 0), ('u', 0), ('u', 1), ('u', 2), ('u', 3)]
    assert [boundary(unit=unit, stage=stage).interpolate(value) for unit, stage in units] == expected
    assert boundary(num_blocks=2).interpolate(value) == expected[0]


def test_the_task_head_sees_the_shape_of_the_transfers_output():
    assert (boundary().channels, boundary().stride) == (8, 4)


@pytest.mark.parametrize('model', ['detector', 'segmentor', 'classifier'])
@pytest.mark.parametrize('task', ['detector', 'segmentor', 'classifier', None])
def test_a_head_for_another_task_is_refused(model, task):
    bases = {'detector': 'BaseDetector', 'segmentor': 'BaseSegmentor', 'classifier': 'BaseClassifier'}
    other = type('Model', (type(bases[model], (nn.Module,), {}),), {})()
    head = LocalHead.__new__(LocalHead)
    head.task = task
    if task in (model, None):
        head.check_model(other)
    else:
        with pytest.raises(ConfigError, match='set another model.backbone.local_head.type'):
            head.check_model(other)


def test_drop_keys():
    assert drop_keys({'a': 1, 'b': 2}, ['b', 'c']) == {'a': 1} and drop_keys(None, ['b']) == {}


def test_a_model_without_labels_is_refused():
    model = type('SimCLR', (type('BaseSelfSupervisor', (nn.Module,), {}),), {})()
    head = LocalHead.__new__(LocalHead)
    head.task = 'classifier'
    with pytest.raises(
        ConfigError, match='but SimCLR is a self-supervised model, without labels .*; remove mmman.LocalBackbone'
    ):
        head.check_model(model)
    head.task = None  # a head that needs no labels
    head.check_model(model)
