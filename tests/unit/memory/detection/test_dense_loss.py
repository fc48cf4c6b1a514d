"""Which features a neck reads, and which models may be chunked. Losses and gradients are in tests/parity/test_chunks.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmman.errors import ConfigError
from mmman.memory.detection import dense_loss
from mmman.memory.detection.dense_loss import DenseLoss, make_batch_loss


class SingleStageDetector(nn.Module):
    """The parts of mmdet's class that matter here: where ``loss`` is defined, and a neck that skips the first feature."""

    with_neck = True
    loss = extract_feat = None

    def __init__(self):
        super().__init__()
        self.bbox_head = nn.Identity()
        self.calls = []

    def neck(self, features):
        self.calls.append([tuple(feature.shape) for feature in features])
        return [feature + 1 for feature in features[1:]]


def features():
    return [torch.zeros(5, 2, size, size) for size in (8, 4, 2)]


def test_features_that_the_neck_does_not_read_are_freed_and_probed_once(monkeypatch):
    monkeypatch.setattr(dense_loss, 'has_adapter', lambda head: True)
    model = SingleStageDetector()
    dense = DenseLoss(model, 2, lambda loss: loss, make_loss=lambda *args: None)
    for _ in range(2):
        assert dense.neck_and_head(features(), None, [None] * 5, dry_run=True) == {}
    assert model.calls == [[(1, 2, 8, 8), (1, 2, 4, 4), (1, 2, 2, 2)]]  # one image, once
    ran, held = [], features()
    monkeypatch.setattr(dense_loss, 'run_in_chunks', lambda *args: ran.append(args[1:]) or {})
    dense.neck_and_head(held, None, [None] * 5)
    ((freed, *read), parameters, size, factor) = ran[0]
    assert freed.shape == (5, 2, 8, 8) and freed.untyped_storage().nbytes() == 4  # one number, expanded
    assert [level.untyped_storage().nbytes() for level in read] == [4 * 5 * 2 * 4 * 4, 4 * 5 * 2 * 2 * 2]
    assert (parameters, size, factor) == ([*model.bbox_head.parameters()], 2, torch.tensor(1.0)) and held[0] is freed


def test_a_view_of_a_tensor_is_no_read():
    with dense_loss._ReadTracker() as read:
        viewed, added, source = torch.ones(2), torch.ones(2), torch.ones(4)
        viewed[:1].view(1, 1)
        added + 1
        source[2:].sum()
    assert [viewed in read, added in read, source in read] == [False, True, True]


@pytest.mark.parametrize('method', ['loss', 'extract_feat'])
def test_a_model_that_computes_its_loss_in_another_way_is_refused(monkeypatch, method):
    monkeypatch.setattr(dense_loss, 'has_adapter', lambda head: True)
    DenseLoss(SingleStageDetector(), 1, lambda loss: loss)
    other = type('Distiller', (SingleStageDetector,), {method: lambda self: None})
    with pytest.raises(ConfigError, match='Distiller does not compute its loss as SingleStageDetector'):
        DenseLoss(other(), 1, lambda loss: loss)


def test_a_local_head_learns_its_own_objects(monkeypatch):
    monkeypatch.setattr(dense_loss, 'batch_loss', lambda head, sizes, samples, like: samples)
    owner = SimpleNamespace(filter_gt=lambda samples: samples[:1])
    assert make_batch_loss(None, None, ['a', 'b'], [], None) == ['a', 'b']
    assert make_batch_loss(owner, None, ['a', 'b'], [], None) == ['a']
