"""A step of a head on random features: untrained parameters, failures in one line, no trace in the random state."""

import pytest
import torch
from torch import nn

from mmman.heads.dry_run import (
    BATCH_SIZE,
    DryRunError,
    describe_error,
    detection_samples,
    parameters_without_grad,
    total_loss,
)

pytest.importorskip('mmdet')
from tests.unit.heads.test_det import backbone_with


class Head(nn.Module):
    """Two layers, of which a batch trains one; a third is frozen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))
        self.norm = nn.SyncBatchNorm(1)
        self.layers[2].requires_grad_(False)

    def losses(self, *indices):
        for i in indices:
            yield {'loss': [self.norm(self.layers[i](torch.rand(BATCH_SIZE, 2))).square()], 'acc': torch.tensor(1.0)}


def test_what_no_batch_trains_is_named():
    assert parameters_without_grad(Head, lambda head: Head.losses(head, 0, 1)) == ()
    assert parameters_without_grad(Head, lambda head: Head.losses(head, 0)) == ('layers.1.weight', 'layers.1.bias')


def test_a_failure_is_described_on_one_line():
    def fails(head):
        raise KeyError('a\nb')
        yield

    with pytest.raises(DryRunError, match=r"^KeyError: 'a\\nb'$"):
        parameters_without_grad(Head, fails)
    with pytest.raises(DryRunError, match='^TypeError: '):
        parameters_without_grad(lambda: Head(1), fails)
    assert describe_error(ValueError('a\nb ' * 99)).startswith('ValueError: a b a b')
    assert len(describe_error(ValueError('a' * 999))) == 240


def test_losses_are_summed_as_models_sum_them():
    losses = {'loss_a': torch.tensor([1.0, 3.0]), 'loss_b': [torch.tensor(4.0), torch.tensor([5.0])], 'acc': torch.tensor(9.0)}
    assert total_loss(losses) == 2 + 4 + 5


@pytest.mark.parametrize('masks', [False, True])
def test_objects_of_all_sizes_lie_inside_the_image(masks):
    samples = detection_samples(64, classes=3, masks=masks)
    assert len(samples) == BATCH_SIZE
    for sample in samples:
        boxes = sample.gt_instances.bboxes
        assert boxes.min() >= 0 and boxes.max() <= 64
        sides = (boxes[:, 2:] - boxes[:, :2]).unique().tolist()
        assert sides == [8, 16, 32, 64] and {*sample.gt_instances.labels.tolist()} == {0, 1, 2}
        if masks:
            areas = sample.gt_instances.masks.areas
            assert areas.tolist() == (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
    assert len(detection_samples(64, 3, objects_per_side=0)[0].gt_instances) == 0


def test_a_dry_run_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', None)  # neither on a GPU
    monkeypatch.setattr('mmman.heads.det._UNTRAINED', {})
    draws = []
    for _ in range(2):  # the second finds the answer of the first
        torch.default_generator.manual_seed(0)
        weights = [p.detach().clone() for p in backbone_with('RetinaHead', norm_cfg={'type': 'BN'}).parameters()]
        draws.append((weights, torch.rand(3)))
    assert all(torch.equal(*pair) for pair in zip(draws[0][0], draws[1][0], strict=True))
    assert torch.equal(draws[0][1], draws[1][1])
