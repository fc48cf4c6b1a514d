"""Narrow and shallow variants of backbones that no option makes small: subclasses that inherit their forward pass."""

import importlib

from mmengine.registry import MODELS

ATTRIBUTES = {
    'mmdet.Darknet': {'arch_settings': {53: ((1, 2, 1, 1, 2), ((32, 8), (8, 8), (8, 12), (12, 16), (16, 24)))}},
    'mmdet.EfficientNet': {'arch_settings': {'b0': (0.25, 0.6, 32)}},
    'mmpretrain.EfficientNet': {'arch_settings': {'b0': (0.25, 0.6, 32), 'es': (0.25, 0.5, 32)}},
    'mmpretrain.EfficientNetV2': {
        'arch_settings': {
            'b0': [
                [1, 3, 1, 1, 8, 8, 0.0, -1],
                [2, 3, 2, 4, 8, 12, 0.0, 0],
                [2, 3, 2, 4, 12, 16, 0.25, 1],
                [2, 3, 1, 6, 16, 16, 0.25, 1],
                [1, 1, 1, 1, 16, 32, 0.0, -2],
            ]
        }
    },
    'mmpretrain.CSPDarkNet': {
        'arch_settings': {
            53: {
                'in_channels': (8, 8, 12),
                'out_channels': (8, 12, 16),
                'num_blocks': (1, 2, 1),
                'expand_ratio': (2, 1, 1),
                'bottle_ratio': (2, 1, 1),
                'has_downsampler': True,
                'down_growth': True,
            }
        }
    },
    'mmpretrain.CSPResNet': {
        'arch_settings': {
            50: {
                'in_channels': (8, 12, 16, 24),
                'out_channels': (12, 16, 24, 32),
                'num_blocks': (1, 2, 1, 1),
                'expand_ratio': 2,
                'bottle_ratio': 2,
                'has_downsampler': (False, True, True, True),
                'down_growth': False,
            }
        }
    },
    'mmpretrain.ResNeXt': {'arch_settings': {50: (1, 2, 2, 1)}},
    'mmpretrain.SEResNet': {'arch_settings': {50: (1, 2, 2, 1)}},
    'mmpretrain.MobileNetV2': {
        'arch_settings': [
            [1, 16, 1, 1],
            [6, 24, 2, 2],
            [6, 32, 1, 2],
            [6, 64, 2, 2],
            [6, 96, 1, 1],
            [6, 160, 1, 2],
            [6, 320, 1, 1],
        ]
    },
    'mmpretrain.Vig': {'arch_settings': {'tiny': {'num_blocks': 4, 'channels': 16}}},
    'mmpretrain.PyramidVig': {'arch_settings': {'tiny': {'blocks': [1, 2, 1, 1], 'channels': [8, 8, 12, 16]}}},
}


WIDTHS = {'mmpretrain.VGG': 8, 'mmdet.SSDVGG': 8}
"""What to divide the widths by that are numbers in a backbone's ``__init__``."""


def is_narrowed(kind):
    """Whether ``kind`` has a narrow variant."""
    return kind in ATTRIBUTES or kind in WIDTHS


def narrow(kind):
    """Register the narrow variant of ``kind``, e.g. ``mmdet.Darknet``, and return the name to build it by."""
    library, _, name = kind.partition('.')
    base = getattr(importlib.import_module(f'{library}.models.backbones'), name)
    registered = f'Narrow{library.capitalize()}{name}'
    if registered not in MODELS.module_dict:
        attributes = {'__init__': narrow_init(base, WIDTHS[kind])} if kind in WIDTHS else dict(ATTRIBUTES[kind])
        if name.startswith('CSP'):  # the block is a class
            settings = {depth: {**base.arch_settings[depth], **arch} for depth, arch in attributes['arch_settings'].items()}
            attributes['arch_settings'] = settings
        elif name.startswith(('ResNe', 'SERes')):
            settings = {depth: (base.arch_settings[depth][0], blocks) for depth, blocks in attributes['arch_settings'].items()}
            attributes['arch_settings'] = settings
        MODELS.register_module(name=registered, module=type(registered, (base,), {**attributes, '__module__': __name__}))
    return f'mmengine.{registered}'


def narrow_init(base, divisor):
    """An ``__init__`` that divides the widths of all layers, but not the numbers of image channels and classes."""

    def init(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        for module in self.modules():
            for name in ('in_channels', 'out_channels', 'in_features', 'out_features', 'num_features'):
                if getattr(module, name, 1) % divisor == 0:
                    setattr(module, name, getattr(module, name) // divisor)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                sizes = [size // divisor if size % divisor == 0 else size for size in tensor.shape]
                tensor.data = tensor.new_empty(sizes)
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()

    return init
