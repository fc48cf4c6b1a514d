"""Lock-step parity on mmseg's unmodified DeepLabs: low-level tap, auxiliary head and reconstruction, wherever the cut is."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from torch import nn

from tests.alive import without_gradient
from tests.parity.lockstep import ROWS, compare_steps, reference_of, task_of, total

pytest.importorskip('mmseg')

CLASSES = 5
SIZE = 64
CUTS = [['layer3.0'], ['layer2.1'], ['layer3.1'], ['stem', 'layer1.1', 'layer2.0', 'layer4.0']]
INFOPRO = {'lambda_rec': 1.5, 'lambda_task': 1.0}


def deeplab(name, row, partition, ignored=255, **head):
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    model = get_config(f'mmseg::{name}/{name}_r18-d8_4xb2-80k_cityscapes-512x1024.py').model
    model.pretrained = None
    model.data_preprocessor.size = (SIZE, SIZE)
    model.backbone.update(base_channels=8, depth=18)
    model.decode_head.update(in_channels=64, channels=16, num_classes=CLASSES, dropout_ratio=0, ignore_index=ignored)
    if 'c1_in_channels' in model.decode_head:
        model.decode_head.update(c1_in_channels=8, c1_channels=4)
    model.auxiliary_head.update(in_channels=32, channels=8, num_classes=CLASSES, dropout_ratio=0)
    network = {'type': 'FCNHead', 'channels': 8, 'num_convs': 1, 'concat_input': False, 'dropout_ratio': 0}
    model.backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': model.backbone,
        'partition': partition,
        'transfer': ROWS[row],
        'local_head': {'type': 'mmman.SegLocalHead', 'decode_head': model.decode_head, 'network': network, **head},
    }
    model = revert_sync_batchnorm(MODELS.build(model)).train()
    model.backbone.local.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model.double()


def images(seed, count=2, width=48):
    """Images narrower than the batch, which pads them; some pixels are to be ignored."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (1, SIZE, width), generator=generator)
        labels[:, :4] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    pixels = torch.randint(256, (count, 3, SIZE, width), generator=generator, dtype=torch.uint8)
    return {'inputs': [*pixels], 'data_samples': samples}


def task_modules(model):
    return [model.decode_head, model.auxiliary_head]


@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize('name', ['deeplabv3', 'deeplabv3plus'])
@pytest.mark.parametrize(
    'partition', [['layer3.0'], ['layer2.1'], ['layer3.1'], ['stem', 'layer1.1', 'layer2.0', 'layer4.0']], ids=str
)
def test_bitwise_parity(name, partition, row):
    torch.manual_seed(0)
    lockstep(deeplab(name, row, partition, **(INFOPRO if row != 'ema' else {})), row)


def lockstep(model, row):
    def local_loss(j, task, y, batch):
        task.session = SimpleNamespace(model=model)
        return total(task.loss(y, batch['inputs'], batch['data_samples']))

    def task_loss(own, features, batch):
        decode, auxiliary = (total(head.loss(features, batch['data_samples'], {})) for head in own)
        return decode + auxiliary

    other = reference_of(
        model.backbone,
        task_modules(model),
        ROWS[row],
        task_of,
        local_loss,
        task_loss,
        stem=lambda backbone, modules: nn.Sequential(*modules),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        momentum=0.9,
    )
    gradients = compare_steps(model, other, [images(0), images(1)], task_modules)
    still = without_gradient(gradients)
    assert not still, f'no gradient at {still}'
