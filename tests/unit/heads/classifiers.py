"""What tests of classifiers' local heads share: a boundary, a head, a batch, and as much of a model as a head looks at."""

import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

from mmman import MomentumTransfer
from mmman.local import Boundary
from mmman.partition import Feature, Unit

MAP = Feature(8, 4)


HEAD = {
    'type': 'mmpretrain.LinearClsHead',
    'num_classes': 3,
    'in_channels': 99,
    'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
}


def boundary(feature=MAP, block=1, num_blocks=4, following=(), unit='u', stage=0, position=0):
    modules, features = zip(*following, strict=True) if following else ((), ())
    source = Unit.single('v', stage)
    place = {'position': position, 'next_stage': stage}
    return Boundary(block, num_blocks, unit, source, feature, feature, False, (4,), modules, features, **place)


def local_head(kind, head=HEAD, where=None, **options):
    init_default_scope('mmpretrain')
    where = where or boundary()
    transfer = MomentumTransfer(nn.Identity(), where.feature, ema=False, bias=False, scale=False)
    return MODELS.build({'type': f'mmman.{kind}', 'head': head, 'boundary': where, 'transfer': transfer, **options})


def samples(labels=(0, 1, 2, 0), **metainfo):
    return [DataSample(metainfo=metainfo).set_gt_label(label) for label in labels]


Y = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))


IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """As much of a model as a head looks at."""

    def __init__(self, num_classes=3, **preprocessor):
        super().__init__()
        self.head = nn.Module()
        self.head.num_classes = num_classes
        self.data_preprocessor = MODELS.build({'type': 'mmpretrain.ClsDataPreprocessor', **preprocessor})


class Session:
    model = None
