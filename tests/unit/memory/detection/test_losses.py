"""Losses of mmdet's dense heads for some images at a time: their sum is the loss of the batch, by mmdet's own code."""

import pytest
import torch
from mmengine.structures import InstanceData

from mmman.errors import ConfigError
from mmman.memory.detection import losses
from mmman.memory.detection.losses import batch_loss, check_norms, dense_head_losses, has_adapter, map_sizes

pytest.importorskip('mmdet')
from mmdet.structures import DetDataSample

ASSIGNER = {'type': 'MaxIoUAssigner', 'pos_iou_thr': 0.5, 'neg_iou_thr': 0.4, 'min_pos_iou': 0, 'ignore_iof_thr': -1}
TRAINING = {'assigner': ASSIGNER, 'sampler': {'type': 'PseudoSampler'}, 'allowed_border': -1, 'pos_weight': -1, 'debug': False}
SQUARES = {'type': 'AnchorGenerator', 'ratios': [1.0], 'octave_base_scale': 8, 'scales_per_octave': 1}
HEADS = {
    'RetinaHead': {'train_cfg': TRAINING},
    'ATSSHead': {
        'train_cfg': {**TRAINING, 'assigner': {'type': 'ATSSAssigner', 'topk': 9}},
        'anchor_generator': {**SQUARES, 'strides': [8, 16, 32, 64, 128]},
        'loss_bbox': {'type': 'GIoULoss', 'loss_weight': 2.0},
        'norm_cfg': None,
    },
    'FCOSHead': {'strides': [8, 16, 32, 64, 128], 'norm_cfg': None},
}
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def head_of(kind):
    from mmdet.models import dense_heads

    torch.manual_seed(0)
    return getattr(dense_heads, kind)(num_classes=5, in_channels=8, feat_channels=8, stacked_convs=1, **HEADS[kind])


def batch(counts=(3, 0, 5, 1)):
    """Data samples of images of 64x96 pixels with so many objects, and the head's feature maps."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for count in counts:
        corners = (torch.rand(count, 2, 2, generator=generator) * torch.tensor([96.0, 64.0])).sort(dim=1).values
        sample = DetDataSample(metainfo={'img_shape': (64, 96), 'pad_shape': (64, 96)})
        labels = torch.randint(5, (count,), generator=generator)
        sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=labels)
        samples.append(sample)
    return samples, [torch.randn(len(counts), 8, *size, generator=generator) for size in SIZES]


def sums(losses):
    return {name: (sum(value) if isinstance(value, list) else value).item() for name, value in losses.items()}


@pytest.mark.parametrize('counts', [(3, 0, 5, 1), (0, 0)])
@pytest.mark.parametrize('kind', HEADS)
def test_losses_of_the_images_add_up_to_mmdets_loss_of_the_batch(kind, counts):
    head = head_of(kind)
    samples, feature_maps = batch(counts)
    theirs = sums(head.loss(tuple(feature_maps), samples))
    losses = batch_loss(head, map_sizes(feature_maps), samples, feature_maps[0])
    assert sums(losses(head(feature_maps))) == pytest.approx(theirs, rel=1e-5)
    total = dict.fromkeys(theirs, 0.0)
    for start in range(0, len(samples), 3):
        images = slice(start, start + 3)
        for name, value in sums(losses(head([level[images] for level in feature_maps]), images)).items():
            total[name] += value
    assert total == pytest.approx(theirs, rel=1e-5)


def test_targets_of_a_whole_batch_are_made_after_the_head_has_run():
    head, order = head_of('RetinaHead'), []
    samples, feature_maps = batch()
    head.register_forward_hook(lambda *_: order.append('head'))

    def make_loss(sizes, like):
        order.append('targets')
        assert sizes == SIZES and like.shape == (4, 45, 8, 12)
        return batch_loss(head, sizes, samples, like)

    losses = dense_head_losses(head, feature_maps, make_loss)
    assert order == ['head', 'targets'] and {*losses} == {'loss_cls', 'loss_bbox'}


@pytest.mark.parametrize('kind', HEADS)
@pytest.mark.parametrize('method', ['loss', 'loss_by_feat'])
def test_a_head_that_computes_its_loss_in_another_way_has_no_adapter(kind, method):
    """The adapters would leave it out."""
    head = head_of(kind)
    assert has_adapter(head)
    head.__class__ = type('Mine', (type(head),), {method: lambda self, *args: {}})
    assert not has_adapter(head)


def test_training_batchnorm_mixes_images():
    norm = torch.nn.BatchNorm2d(4)
    check_norms('Detector', [norm.eval(), torch.nn.GroupNorm(1, 4)])
    message = r'^Detector has BatchNorm in training mode behind the backbone \(Sequential\.0\).*images_per_chunk=None'
    with pytest.raises(ConfigError, match=message):
        check_norms('Detector', [torch.nn.Sequential(norm.train())])


def test_another_version_of_mmdet_is_refused(monkeypatch):
    losses._adapter_class.cache_clear()
    monkeypatch.setattr('mmdet.__version__', '3.4.0')
    with pytest.raises(ConfigError, match=r'requires mmdet 3.3, but mmdet 3.4.0 is installed'):
        has_adapter(head_of('RetinaHead'))
