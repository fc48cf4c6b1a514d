"""All levels of a dense head in two calls: the outputs, losses and gradients of the levels one by one."""

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmman.memory.detection.dense_loss import ChunkedLoss
from mmman.memory.detection.losses import batch_loss, map_sizes, packed_head
from mmman.memory.detection.packed_head import Canvas, can_pack
from tests.unit.memory.detection.test_losses import HEADS, SIZES, TRAINING, batch, head_of

pytest.importorskip('mmdet')

CPU = torch.device('cpu')
LAYOUTS = [
    [(4, 6), (2, 3), (1, 2), (1, 1)],  # the column is higher than the first level
    [(26, 40), (13, 20), (7, 10), (4, 5)],
    [(9, 3), (2, 7), (3, 1)],
    [(5, 5)],
]


@pytest.mark.parametrize('sizes', LAYOUTS, ids=str)
def test_levels_lie_apart(sizes):
    canvas, taken = Canvas(sizes), torch.zeros(200, 200, dtype=torch.int)
    for (rows, columns), (height, width) in zip(canvas.places, sizes, strict=True):
        assert (rows.stop - (rows.start or 0), columns.stop - (columns.start or 0)) == (height, width)
        around = slice(max(0, (rows.start or 0) - 1), rows.stop), slice(max(0, (columns.start or 0) - 1), columns.stop)
        taken[around] += 1  # with the gutter above and to the left
    assert taken.max() == 1
    used = taken.nonzero().amax(0) + 1
    assert canvas.size == (*used.tolist(),)
    assert (~canvas.gutters(CPU)).sum() == sum(height * width for height, width in sizes)


def test_stock_sizes_waste_little():
    """Of all positions of a RetinaNet at 416x640, and at 800x1344."""
    for first, others in (((52, 80), LAYOUTS[1]), ((100, 168), [(50, 84), (25, 42), (13, 21), (7, 11)])):
        positions = first[0] * first[1] + sum(height * width for height, width in others)
        height, width = Canvas(others).size
        assert first[0] * first[1] + height * width < 1.04 * positions


def test_levels_are_packed_and_gradients_unpacked():
    canvas = Canvas(LAYOUTS[0])
    levels = [torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True) for size in LAYOUTS[0]]
    packed = canvas.pack(levels)
    assert all(torch.equal(packed[(..., *place)], level) for place, level in zip(canvas.places, levels, strict=True))
    assert not packed[..., canvas.gutters(CPU)].any()
    assert torch.autograd.gradcheck(lambda *levels: canvas.pack(levels), levels)


def test_targets_lie_where_the_scores_are():
    canvas, anchors = Canvas(LAYOUTS[0]), 3
    maps = [torch.arange(2 * anchors * h * w).view(2, anchors, h, w) + 1000 * i for i, (h, w) in enumerate(LAYOUTS[0])]
    by_anchor = [level.permute(0, 2, 3, 1).reshape(2, -1) for level in maps]
    packed = canvas.pack_targets(by_anchor, -1)
    on_map = packed.view(2, *canvas.size, anchors).permute(0, 3, 1, 2)
    for place, level in zip(canvas.places, maps, strict=True):
        assert torch.equal(on_map[(..., *place)], level)
    assert (on_map[..., canvas.gutters(CPU)] == -1).all()
    boxes = canvas.pack_targets([level[..., None].expand(-1, -1, 4) for level in by_anchor], 0)
    assert boxes.shape == (2, packed.shape[1], 4)


def losses_and_gradients(run, head, feature_maps, samples, packed=None):
    leaves = [level.double().requires_grad_() for level in feature_maps]
    loss = batch_loss(head, map_sizes(leaves), samples, leaves[0])
    if packed is not None:
        loss.pack_(packed)
    values = [sum(own) for own in loss(run(leaves)).values()]
    return values, torch.autograd.grad(sum(values), [*leaves, *head.parameters()])


@pytest.mark.parametrize('counts', [(3, 0, 5, 1), (0, 0)], ids=str)
@pytest.mark.parametrize(
    ('convs', 'loss', 'tolerance'),
    [(0, 'FocalLoss', 1e-12), (1, 'FocalLoss', 1e-12), (3, 'FocalLoss', 1e-12), (1, 'CrossEntropyLoss', 1e-5)],  # in float32
)
def test_losses_and_gradients_of_the_levels_one_by_one(convs, loss, tolerance, counts):
    from mmdet.models.dense_heads import RetinaHead

    torch.manual_seed(0)
    options = {'loss_cls': {'type': loss, 'use_sigmoid': True}, 'train_cfg': TRAINING}
    head = RetinaHead(num_classes=5, in_channels=8, feat_channels=8, stacked_convs=convs, **options)
    for parameter in head.double().parameters():
        nn.init.normal_(parameter, std=0.1)  # biases too: they make a gutter's values other than zero
    samples, feature_maps = batch(counts)
    for sample in samples:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()
    packed = packed_head(head, SIZES, CPU)
    expected = losses_and_gradients(head, head, feature_maps, samples)
    found = losses_and_gradients(packed, head, feature_maps, samples, packed)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_an_infinite_value_in_a_gutter_does_not_spread():
    head = head_of('RetinaHead').double()
    packed = packed_head(head, SIZES, CPU)
    feature_maps = [level[:1].double() for level in batch()[1]]
    feature_maps[1][..., -1] = torch.inf  # beside a gutter
    with torch.no_grad():
        scores = packed(feature_maps)[0][1]
        alone = head(feature_maps[2:])[0][0]
    assert torch.equal(scores[(..., *packed.canvas.places[1])].isfinite(), alone.isfinite())


@pytest.mark.parametrize(
    'change',
    [
        lambda head: head.register_forward_hook(lambda *_: None),
        lambda head: head.cls_convs[0].conv.register_forward_pre_hook(lambda *_: None),
        lambda head: head.compile(backend='eager'),
        lambda head: setattr(head.retina_cls, 'padding_mode', 'reflect'),
        lambda head: setattr(head.retina_reg, 'padding', (2, 2)),
        lambda head: setattr(head, 'retina_reg', nn.Conv2d(8, 36, 1)),
        lambda head: setattr(head.reg_convs[0], 'activate', nn.GELU()),
        lambda head: setattr(head.reg_convs[0], 'conv', nn.Conv2d(8, 8, 3, dilation=2, padding=2)),
        lambda head: setattr(head, '__class__', type('Mine', (type(head),), {'forward_single': lambda self, x: x})),
        lambda head: setattr(head, '__class__', type('Mine', (type(head),), {'forward': lambda self, x: x})),
    ],
)
def test_another_head_runs_level_by_level(change):
    head = head_of('RetinaHead')
    assert can_pack(head)
    change(head)
    assert not can_pack(head)


@pytest.mark.parametrize('kind', [kind for kind in HEADS if kind != 'RetinaHead'])
def test_other_kinds_run_level_by_level(kind):
    assert packed_head(head_of(kind), SIZES, CPU) is None


def test_norms_two_levels_and_decoded_boxes_run_level_by_level():
    from mmdet.models.dense_heads import RetinaHead

    head = head_of('RetinaHead')
    assert packed_head(head, SIZES[:2], CPU) is None and packed_head(head, SIZES[:3], CPU) is not None
    head.reg_decoded_bbox = True
    assert packed_head(head, SIZES, CPU) is None
    assert not can_pack(RetinaHead(5, 8, feat_channels=8, norm_cfg={'type': 'GN', 'num_groups': 2}))


def test_what_follows_the_backbone_calls_the_head_in_two_parts():
    class Model(BaseModel):
        def forward(self):
            """Unused."""

    head, calls = head_of('RetinaHead'), []
    stock = head.retina_cls._conv_forward
    head.retina_cls._conv_forward = lambda x, *rest: calls.append(x.shape) or stock(x, *rest)
    samples, feature_maps = batch()
    for chunk_size in (None, 2):
        calls.clear()
        loss = ChunkedLoss(Model(), chunk_size, lambda loss: loss)
        if chunk_size is None:
            loss._in_one_pass(None, head, feature_maps, samples)
        else:
            loss._run(None, lambda leaves: leaves, [*feature_maps], [head], head, samples, chunk_size, dry_run=False)
        assert len(calls) == 2 * (4 // (chunk_size or 4))
