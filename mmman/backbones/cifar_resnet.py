"""The ResNets that He et al. trained on CIFAR; mmpretrain's ``ResNet_CIFAR`` is an ImageNet ResNet with a small stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from mmengine.model import BaseModule
from torch import Tensor

from mmman.errors import ConfigError
from mmman.options import Count, Range, checked
from mmman.registry import MODELS


@MODELS.register_module()
@checked('CIFARResNet')
class CIFARResNet(BaseModule):
    """ResNet of depth 6n+2 for 32x32 images: a 3x3 stem and three stages of n basic blocks with 16, 32 and 64 channels.

    "Deep Residual Learning for Image Recognition", section 4.2. Where a stage changes the shape, the shortcut is a 1x1
    convolution with BN (option B), as in the code of the local-learning papers. Needs mmpretrain, whose blocks it is made of.

    Args:
        depth: 20, 32, 44, 56, 110, ...: 6n+2.
        in_channels: Channels of the image.
        out_indices: Stages (0 to 2) whose outputs are returned.
        norm_cfg: Config of the norm layers.
        init_cfg: mmengine's initialisation. Default: He for convolutions, 1 for norms.

    Raises:
        ConfigError: ``depth`` is no 6n+2.
    """

    def __init__(
        self,
        depth: int,
        in_channels: Count = 3,
        out_indices: Sequence[Annotated[int, Range(0, 2)]] = (2,),
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        from mmcv.cnn import ConvModule
        from mmpretrain.models.backbones.resnet import BasicBlock, ResLayer

        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f'CIFARResNet.depth={depth}: expected 6n+2, e.g. 20, 32, 44, 56 or 110')
        super().__init__(
            init_cfg
            or [
                {'type': 'Kaiming', 'layer': 'Conv2d'},
                {'type': 'Constant', 'layer': ['_BatchNorm', 'GroupNorm'], 'val': 1},
            ]
        )
        norm_cfg = norm_cfg or {'type': 'BN'}
        self.out_indices = tuple(out_indices)
        self.stem = ConvModule(in_channels, 16, 3, padding=1, norm_cfg=norm_cfg)
        self.res_layers = []
        inputs = 16
        for stage, channels in enumerate((16, 32, 64)):
            layer = ResLayer(BasicBlock, blocks, inputs, channels, stride=2 if stage else 1, norm_cfg=norm_cfg)
            self.res_layers.append(f'layer{stage + 1}')
            self.add_module(self.res_layers[-1], layer)
            inputs = channels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """From images (B, 3, H, W) to one map (B, 16 * 2^i, H / 2^i, W / 2^i) for each stage i of ``out_indices``."""
        x = self.stem(x)
        outs = []
        for stage, name in enumerate(self.res_layers):
            x = self.get_submodule(name)(x)
            if stage in self.out_indices:
                outs.append(x)
        return tuple(outs)
