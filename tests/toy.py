"""A small residual network, classifier and local head, as a user of mmman would register their own."""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, BaseModule, Sequential
from torch import nn

from mmman import LocalHead, register_chain
from mmman.partition import Chain, Unit
from mmman.registry import MODELS

CLASSES = 5


class ToyUnit(BaseModule):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.skip(x))


@MODELS.register_module()
class ToyNet(BaseModule):
    def __init__(self, units=(2, 2, 2), width=4, out_indices=(1, 2), norm_eval=False):
        super().__init__(init_cfg={'type': 'Kaiming', 'layer': 'Conv2d'})
        self.out_indices, self.norm_eval = out_indices, norm_eval
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for i, count in enumerate(units):
            outputs = width * 2**i
            first = ToyUnit(outputs if i == 0 else outputs // 2, outputs, stride=1 if i == 0 else 2)
            self.add_module(f'layer{i + 1}', Sequential(first, *(ToyUnit(outputs, outputs) for _ in range(count - 1))))
        self.stages = [f'layer{i + 1}' for i in range(len(units))]

    def forward(self, x):
        x = self.stem(x)
        outs = []
        for i, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode=True):
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


@register_chain(f'{ToyNet.__module__}.ToyNet')
def toy_chain(backbone):
    units, out_units = [Unit.single('stem', 0)], []
    for i, name in enumerate(backbone.stages):
        units += [Unit.single(f'{name}.{child}', i) for child, _ in backbone.get_submodule(name).named_children()]
        if i in backbone.out_indices:
            out_units.append(len(units) - 1)
    return Chain(tuple(units), tuple(out_units))


@MODELS.register_module()
class ToyLocalHead(LocalHead):
    def __init__(self, boundary, transfer, loss_weight=1.0):
        super().__init__(boundary, transfer, loss_weight)
        self.fc = nn.Sequential(nn.Conv2d(boundary.channels, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, CLASSES))

    def loss(self, y, inputs, data_samples):
        return classify(self.fc(F.adaptive_avg_pool2d(y, 2)), data_samples)


@MODELS.register_module()
class ToyLinearHead(BaseModule):
    """A linear classification head with mmpretrain's interface, whose data samples are labels."""

    def __init__(self, in_channels, num_classes=CLASSES):
        super().__init__()
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, feats):
        return self.fc(feats[-1])

    def loss(self, feats, data_samples):
        return classify(self(feats), data_samples)


@MODELS.register_module()
class ToyClassifier(BaseModel):
    def __init__(self, backbone, channels=(8, 16)):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.ModuleList(nn.Linear(c, CLASSES) for c in channels)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = task_logits(self.head, self.backbone(inputs))
        return classify(logits, data_samples) if mode == 'loss' else logits


def task_logits(head, features):
    return sum(linear(x.mean((2, 3))) for linear, x in zip(head, features, strict=True))


def classify(logits, labels):
    """A loss, and beside it an accuracy that has a gradient, so that summing it into the loss would show."""
    return {'loss_ce': F.cross_entropy(logits, labels), 'acc': logits.softmax(1).gather(1, labels[:, None]).mean()}


def toy_config(num_blocks=4, partition='uniform', transfer=None, net=None, **options):
    return {
        'type': 'mmman.ToyClassifier',
        'backbone': {
            'type': 'mmman.LocalBackbone',
            'backbone': {'type': 'mmman.ToyNet', **(net or {})},
            'num_blocks': num_blocks,
            'partition': partition,
            'transfer': transfer,
            'local_head': {'type': 'mmman.ToyLocalHead'},
            **options,
        },
    }


def toy_batches(count=6, size=4, pixels=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, 3, pixels, pixels, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (count, size), generator=generator)
    return [{'inputs': x, 'data_samples': y} for x, y in zip(images, labels, strict=True)]


def block_parameters(backbone):
    """For each of the first K-1 blocks, the parameters that its local loss trains: the block's and its head's."""
    local = backbone.local
    return [
        [*(p for unit in block for p in unit.parameters(backbone)), *head.parameters()]
        for block, head in zip(local.plan.blocks[:-1], local.values(), strict=True)
    ]
