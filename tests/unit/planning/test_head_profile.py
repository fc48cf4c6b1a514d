"""Costs of local heads are measured once for heads that are alike."""

import logging

import pytest
from mmengine.logging import MMLogger

from mmman.errors import CostError
from mmman.planning.head_profile import HeadCosts, quiet
from mmman.planning.profile import profile_step
from tests.unit.planning.test_profile import load


@pytest.mark.whole_models
def test_heads_that_are_alike_are_run_once():
    profile = profile_step(load('paper/resnet32_manpp_k16_cifar10.py'), 2, 32, 32)
    heads = {id(profile.step.head(cut, None, True, False)) for cut in profile.step.candidates}
    assert len(profile.step.candidates) == 15
    assert len(heads) == 5 + 3  # a copy of a stage's first unit and of its others; the last three have fewer units behind


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'transfer': {'source_unit': 'next_stage'}}, "set transfer.source_unit='next'"), ({'window': 2}, 'set window=1')],
)
def test_options_that_plans_do_not_cover(options, message):
    with pytest.raises(CostError, match=message):
        HeadCosts(None, options, 0.0, {})


def test_log_levels_return_also_after_an_error():
    logger = MMLogger.get_current_instance()
    level = logger.level
    with pytest.raises(ZeroDivisionError), quiet(logging.ERROR):
        assert logger.level == logging.ERROR
        raise ZeroDivisionError
    assert logger.level == level
