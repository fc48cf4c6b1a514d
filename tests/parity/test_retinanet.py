"""Lock-step parity on mmdet's unmodified RetinaNet-R18, trained by Runner with clipping and accumulation."""

import math

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from tests.parity.lockstep import ROWS, LockStepHook, pairs, reference_of, run_lockstep

mmdet = pytest.importorskip('mmdet')

CLASSES = 5
OCTAVE = 2 ** (2 / 3)  # RetinaNet's largest anchor of a level over its smallest
STAGE_CUTS = {  # the smallest anchors of P3, P4, P5 are 32, 64, 128 pixels; an IoU of 0.5 allows a factor sqrt(2)
    1: (0, 32 * OCTAVE * math.sqrt(2)),
    2: (64 / math.sqrt(2), 64 * OCTAVE * math.sqrt(2)),
    3: (128 / math.sqrt(2), math.inf),
}


def retinanet(row, num_blocks, partition='stage'):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    model = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model
    model.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    model.bbox_head.num_classes = CLASSES
    model.backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': model.backbone,
        'num_blocks': num_blocks,
        'partition': partition,
        'transfer': row,
        'local_head': {'type': 'mmman.DetLocalHead', 'bbox_head': model.bbox_head, 'train_cfg': model.train_cfg},
    }
    return MODELS.build(model).double()


def images(count, height=96, width=128, seed=0):
    """Images with one small, one middle-sized and one large object each, as a dataset gives them."""
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(count):
        sample = DetDataSample(
            metainfo={'img_shape': (height, width), 'pad_shape': (height, width), 'scale_factor': (1.0, 1.0)}
        )
        boxes = torch.tensor([[4.0, 4, 30, 34], [20, 10, 90, 70], [2, 3, 126, 90]])
        labels = torch.randint(CLASSES, (3,), generator=generator)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({'inputs': pixels, 'data_samples': sample})
    return batch


def total(losses):
    return sum(sum(part.mean() for part in (v if isinstance(v, list) else [v])) for k, v in losses.items() if 'loss' in k)


def of_sizes(samples, low, high):
    views = []
    for sample in samples:
        x0, y0, x1, y1 = sample.gt_instances.bboxes.unbind(1)
        size = ((x1 - x0) * (y1 - y0)).sqrt()
        view = sample.new()
        view.gt_instances = sample.gt_instances[(size >= low) & (size <= high)]
        views.append(view)
    return views


def local_task(head):
    return torch.nn.ModuleList([head.projection, head.bbox_head])


@pytest.mark.parametrize('row', ROWS)
def test_bitwise_parity(row, tmp_path):
    # without a transfer the heads see strides 4, 8, 16: P3, P3, P4 to P7
    untransferred = [STAGE_CUTS[1], STAGE_CUTS[1], (STAGE_CUTS[2][0], math.inf)]
    sizes = untransferred if row == 'local' else [*STAGE_CUTS.values()]
    torch.manual_seed(0)
    model = retinanet(ROWS[row], num_blocks=4)

    def make_reference(model):
        return reference_of(
            model.backbone,
            [model.neck, model.bbox_head],
            ROWS[row],
            local_task,
            local_loss=lambda j, task, y, batch: total(task[1].loss(task[0](y), of_sizes(batch['data_samples'], *sizes[j]))),
            task_loss=lambda own, features, batch: total(own[1].loss(own[0](features), batch['data_samples'])),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
            momentum=0.9,
            accumulate=2,
            max_norm=1.0,
        )

    hook = LockStepHook(
        make_reference,
        lambda model, ref: pairs(model, ref, local_task, lambda model: [model.neck, model.bbox_head]),
        prepare=lambda model, batch: model.data_preprocessor(batch, True),
    )
    run_lockstep(
        model,
        hook,
        torch.utils.data.DataLoader(images(8), batch_size=2, collate_fn=pseudo_collate),
        tmp_path,
        iters=4,
        optim_wrapper={
            'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9, 'weight_decay': 1e-4},
            'accumulative_counts': 2,
            'clip_grad': {'max_norm': 1.0},
        },
    )
