"""RetinaNet's head with the normaliser of the authors' code."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmman.heads.dry_run import total_loss

pytest.importorskip('mmdet')
from mmdet.models.dense_heads import RetinaHead
from mmdet.structures import DetDataSample

from mmman.heads.release_retina import ReleaseRetinaHead

OPTIONS = {
    'num_classes': 3,
    'in_channels': 8,
    'feat_channels': 8,
    'stacked_convs': 1,
    'anchor_generator': {
        'type': 'AnchorGenerator',
        'octave_base_scale': 4,
        'scales_per_octave': 1,
        'ratios': [1.0],
        'strides': [8],
    },
    'train_cfg': {
        'assigner': {'type': 'MaxIoUAssigner', 'pos_iou_thr': 0.5, 'neg_iou_thr': 0.4, 'match_low_quality': False},
        'sampler': {'type': 'PseudoSampler'},
        'allowed_border': -1,
        'pos_weight': -1,
    },
}


def sample(*boxes):
    made = DetDataSample(metainfo={'img_shape': (64, 64), 'pad_shape': (64, 64)})
    made.gt_instances = InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.ones(len(boxes), dtype=torch.long))
    return made


FITTING, TOO_SMALL = (16.0, 16.0, 48.0, 48.0), (3.0, 3.0, 6.0, 6.0)


@pytest.mark.parametrize(
    ('samples', 'empty', 'count'),
    [
        ([sample(FITTING)], 0, 5),  # the anchor on the box, and its neighbours with an IoU of 0.6
        ([sample(FITTING), sample(TOO_SMALL), sample()], 2, 5),
        ([sample(TOO_SMALL), sample()], 2, 0),
    ],
)
def test_losses_are_divided_by_the_positives_of_the_batch(samples, empty, count):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    ours = ReleaseRetinaHead(**OPTIONS)
    stock = RetinaHead(**OPTIONS)
    stock.load_state_dict(ours.state_dict())
    maps = (torch.randn(len(samples), 8, 8, 8),)
    losses = [total_loss(head.loss(maps, samples)).item() for head in (stock, ours)]
    assert losses[1] / losses[0] == pytest.approx((count + empty) / max(count, 1), rel=1e-5)
