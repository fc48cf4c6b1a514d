"""Chunks of a model of unknown kind: what runs on which images, and how losses are averaged."""

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmman.errors import ConfigError
from mmman.memory.model_loss import ModelLoss, chunked_loss


class Model(BaseModel):
    """Runs its backbone ``runs`` times. Its loss is normalised by the chunk, and it has a parameter outside its modules."""

    def __init__(self, runs=1):
        super().__init__()
        self.backbone, self.head, self.scale = nn.Conv2d(3, 2, 1), nn.Linear(2, 1), nn.Parameter(torch.ones(()))
        self.runs, self.chunks = runs, []

    def forward(self, *args, **kwargs):
        raise NotImplementedError

    def loss(self, inputs, data_samples):
        for _ in range(self.runs):
            features = self.backbone(inputs)
        self.chunks.append((tuple(inputs.shape), tuple(features.shape), [*data_samples]))
        value = self.head(features.mean((2, 3))).square().mean() * self.scale
        return {'loss_a': value, 'acc': value.detach() * 2}


def run(model, size):
    torch.manual_seed(0)
    inputs = torch.randn(5, 3, 4, 4)
    losses = ModelLoss(model, size, lambda loss: loss).task_losses(inputs, [*'abcde'])
    losses['loss_a'].backward()
    return inputs, losses


def test_a_chunk_is_a_batch_of_its_own_and_counts_by_its_images():
    model = Model()
    inputs, losses = run(model, 2)
    assert model.chunks == [
        ((2, 3, 4, 4), (2, 2, 4, 4), ['a', 'b']),
        ((2, 3, 4, 4), (2, 2, 4, 4), ['c', 'd']),
        ((1, 3, 4, 4), (1, 2, 4, 4), ['e']),
    ]
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = sum(model.loss(inputs[i : i + 2], [0])['loss_a'] * len(inputs[i : i + 2]) / 5 for i in (0, 2, 4))
    total.backward()
    torch.testing.assert_close(losses['loss_a'], total)
    torch.testing.assert_close(losses['acc'], 2 * total)
    for name, parameter in model.named_parameters():  # 'scale' is among them
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert 'forward' not in vars(model.backbone)


class Blind(Model):
    def loss(self, inputs, data_samples):
        return {'loss': self.scale.sum()}


@pytest.mark.parametrize(('model', 'message'), [(Blind(), 'Blind ran it 0 times'), (Model(runs=2), 'Model ran it 2 times')])
def test_a_loss_that_does_not_run_the_backbone_once_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        run(model, 2)
    assert 'forward' not in vars(model.backbone)


def test_batchnorm_behind_the_backbone_is_refused():
    model = Model()
    model.head = nn.Sequential(nn.BatchNorm1d(2), model.head)
    with pytest.raises(ConfigError, match=r'BatchNorm in training mode behind the backbone \(Sequential\.0\)'):
        run(model, 2)
    model.head.eval()
    run(model, 2)


def test_an_unknown_model_is_normalised_by_chunk():
    assert type(chunked_loss(Model(), 1, lambda loss: loss)) is ModelLoss
