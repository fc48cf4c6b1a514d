"""A checkpoint without a tensor of the model is refused; whatever has one is loaded as far as it goes."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseTTAModel
from torch import nn

from mmman.errors import CheckpointError
from mmman.runtime.weights_hook import WeightsHook


def load(checkpoint, model=None, is_resumed=False):
    runner = SimpleNamespace(model=model or nn.Linear(2, 3), _resume=is_resumed, _load_from='a.pth')
    WeightsHook().after_load_checkpoint(runner, checkpoint)
    return checkpoint


@pytest.mark.parametrize('state', [{'bias': torch.ones(3)}, {'module.bias': torch.ones(3), 'other': torch.ones(1), 'n': 1}])
def test_one_tensor_of_the_model_is_enough(state):
    load({'state_dict': state})


def test_plain_weights_get_the_key_that_mmengine_reads():
    weights = {'bias': torch.ones(3)}
    assert load(dict(weights)) == {'state_dict': weights}


@pytest.mark.parametrize('state', [{'bias': torch.ones(4)}, {'head.bias': torch.ones(3)}, {'bias': 3}, {}])
def test_names_and_shapes_of_another_model_are_refused(state):
    with pytest.raises(
        CheckpointError, match='^a.pth has no weights of this model: .* weight, bias, ...; give a checkpoint of'
    ):
        load({'state_dict': state})
    load({'state_dict': state}, is_resumed=True)  # which is compared in full elsewhere


def test_a_tensor_is_no_checkpoint_of_a_model():
    with pytest.raises(CheckpointError, match='^a.pth holds a tensor'):
        load(torch.ones(3))


def test_models_for_test_time_augmentation_are_seen_through():
    class Tested(nn.Linear):
        test_step = None

    class Augmented(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    load({'state_dict': {'bias': torch.ones(3)}}, Augmented(Tested(2, 3)))
