"""Whether the bias and the scale of a transfer have an effect: moving them has to move the local loss.

A gradient that isn't zero is no evidence: rounding, or the epsilon of a norm, makes one of nothing. So each of them is moved by
an amount that changes what the transfer returns, in double precision and with norms whose epsilon is negligible.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmman.local.local_head import LocalHead

LEAST = 1e-7  # relative change of the loss, above what is left of a norm's epsilon
_tried: set[str] = set()  # local heads that are alike in all that matters are tried once a process


@torch.no_grad()
def assert_transfer_has_effect(cfg: Config, model: BaseModel) -> None:
    """Assert it for every local head of a model that has a scale; the model may be on the meta device."""
    for key, head in model.backbone.local.items():
        kind = str((head, head.feature, head.output))
        weights = [getattr(head, name, 1) for name in ('lambda_rec', 'lambda_task')]  # 0 at the end of InfoPro's range
        if head.transfer.s is None or not any(weights) or kind in _tried:
            continue
        torch.manual_seed(0)
        head = _real(head)
        transfer, loss = head.transfer, _loss_of(head, cfg, model)
        (transfer.delta if transfer.rho is None else transfer.rho).fill_(0.2)
        biases = [transfer.channel_bias, transfer.depthwise_bias, *(transfer.bias.parameters() if transfer.bias else ())]
        moved = [effect_of(bias, 0.3 * torch.randn_like(bias), loss) for bias in biases if bias is not None]
        assert max(moved) > LEAST, f'{key}: the bias has no effect, {moved}'
        moved = effect_of(transfer.delta if transfer.rho is None else transfer.rho, torch.tensor(0.3), loss)
        assert moved > LEAST, f'{key}: the scale has no effect, {moved}'
        _tried.add(kind)


def effect_of(parameter: Tensor, change: Tensor, loss: Callable[[], float]) -> float:
    """The relative change of a loss where a parameter is moved by ``change``."""
    before, kept = loss(), parameter.detach().clone()
    parameter.data.add_(change)
    after = loss()
    parameter.data.copy_(kept)
    return abs(after - before) / abs(before)


def _real(head: LocalHead) -> LocalHead:
    """A copy of a local head in host memory, in double precision, with random weights."""
    head = revert_sync_batchnorm(copy.deepcopy(head)).to_empty(device='cpu').double()
    for name, tensor in head.state_dict().items():
        if tensor.dim() >= 2:
            tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(('weight', 'var')) else 0))
    for module in head.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            module.eps = 1e-12
    priors = getattr(getattr(head, 'dense_head', None), 'prior_generator', None)
    if hasattr(priors, 'base_anchors'):
        priors.base_anchors = priors.gen_base_anchors()
    return head.train()


def _loss_of(head: LocalHead, cfg: Config, model: BaseModel) -> Callable[[], float]:
    """The local loss on a random output of the block and random annotations, as a function of the head's parameters."""
    small = any(name in str(cfg.model.backbone.backbone.type) for name in ('CIFAR', 'Transformer'))
    side = model.backbone.patch_embed.init_input_size[0] if hasattr(model.backbone, 'patch_embed') else 32 if small else 64
    x = torch.randn(2, head.output.channels, *[side // head.output.stride] * 2, dtype=torch.double)
    if head.output.extra_tokens is not None:
        x = torch.cat([torch.randn(2, x.shape[1], head.output.extra_tokens), x.flatten(2)], dim=2).transpose(1, 2)
    inputs, samples = torch.rand(2, 3, side, side).double(), [_sample(cfg.default_scope, side, i) for i in range(2)]
    preprocessor = copy.deepcopy(model.data_preprocessor).to_empty(device='cpu').double()
    preprocessor.mean.fill_(0)
    preprocessor.std.fill_(255)
    head.session = SimpleNamespace(model=SimpleNamespace(data_preprocessor=preprocessor))

    def loss() -> float:
        torch.manual_seed(1)  # for dropout
        return float(model.parse_losses(head.loss(head.apply_transfer(x, inputs), inputs, samples))[0])

    return loss


def _sample(scope: str, side: int, index: int) -> object:
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        sizes = torch.tensor([20.0, 40, 80, 160, 256], dtype=torch.double).clamp(max=side)
        corners = torch.zeros_like(sizes)
        sample = DetDataSample(metainfo={'img_shape': (side, side), 'pad_shape': (side, side), 'scale_factor': (1.0, 1.0)})
        boxes = torch.stack([corners, corners, sizes, sizes], dim=1)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(5) % 3)
        return sample
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        return SegDataSample(gt_sem_seg=PixelData(data=torch.randint(7, (1, side, side))))
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(torch.tensor([3 - 2 * index]))
