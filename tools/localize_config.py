"""Write the config that trains a stock config's model by MAN++: a child of it, of a dozen lines, to be kept and edited.

    python tools/localize_config.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py -k 4 -o retinanet_manpp_k4.py

It prints the blocks, the local head that it chose, what it keeps of the stock config, and why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmman import LocalLearningError
from mmman.engine.launch import type_name

DENSE = "dict(type='mmman.DetLocalHead', bbox_head=_base_.model.bbox_head{train_cfg})"
TWO_STAGE = "dict(type='mmman.DetLocalHead', num_classes={num_classes})"
SEGMENTATION = "dict(type='mmman.SegLocalHead', decode_head=_base_.model.decode_head)"
CLASSIFICATION = "dict(type='mmman.{kind}', head={head})"

CHILD = """\
_base_ = {base!r}

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks={num_blocks},
        partition={partition!r},
        local_head={local_head},
    )
)
optim_wrapper = dict({optim_wrapper})
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
"""


@dataclass
class Choice:
    """A child config, the backbone that it builds, and why it is as it is."""

    text: str
    backbone: nn.Module
    reasons: list[str]


def localize(stock: str, num_blocks: int, partition: str | list[str] = 'stage') -> Choice:
    """The child of a stock config.

    Args:
        stock: ``library::path`` of a library's config, or the path of a file.
        num_blocks: K.
        partition: See :func:`mmman.partition.plan_blocks`.

    Raises:
        LocalLearningError: Its backbone, or its head, can't be trained so.
    """
    cfg = _load(f'_base_ = {stock!r}\n')
    model = cfg.get('model') or {}
    if 'backbone' not in model:
        raise LocalLearningError(f'{stock} has no model.backbone; give the config of a detector, segmentor or classifier')
    if type_name(model.backbone) == 'LocalBackbone':
        raise LocalLearningError(f'{stock} is localised already')
    wrapper, why_wrapper = _optim_wrapper(cfg)
    failures = []
    for local_head, why_head in _local_heads(cfg):
        text = CHILD.format(
            base=stock, num_blocks=num_blocks, partition=partition, local_head=local_head, optim_wrapper=wrapper
        )
        try:
            backbone = _build_backbone(_load(text))
        except LocalLearningError as error:
            failures.append(str(error))
            continue
        reasons = [f'blocks: {backbone.local.plan}', f'local head: {why_head}', why_wrapper, *_kept(cfg)]
        return Choice(text, backbone, reasons)
    raise LocalLearningError('; '.join(dict.fromkeys(failures)) or f'no local head is known for {type_name(model)}')


def _local_heads(cfg: Config) -> list[tuple[str, str]]:
    """Local heads that may serve, the best first, each with the reason for it."""
    model = cfg.model
    if 'decode_head' in model:
        return [(SEGMENTATION, "FCN, with the classes, losses and sampler of the model's decode_head")]
    if 'bbox_head' in model:
        train_cfg = ', train_cfg=_base_.model.train_cfg' if model.get('train_cfg') else ''
        dense = (DENSE.format(train_cfg=train_cfg), f"the model's own {type_name(model.bbox_head)}, two convolutions a tower")
        retina = TWO_STAGE.format(num_classes='_base_.model.bbox_head.num_classes')
        return [dense, (retina, f"RetinaNet's, because {type_name(model.bbox_head)} cannot predict on a few levels")]
    if 'roi_head' in model:
        index = '[0]' if isinstance(model.roi_head.bbox_head, (list, tuple)) else ''
        number = f'_base_.model.roi_head.bbox_head{index}.num_classes'
        return [(TWO_STAGE.format(num_classes=number), "RetinaNet's, because the detector has no dense head with classes")]
    if 'head' in model:
        head, why = '_base_.model.head', f"the model's own {type_name(model.head)}"
        if 'num_classes' not in model.head and model.backbone.get('num_classes', 0) > 0:
            head = "dict(type='LinearClsHead', num_classes=_base_.model.backbone.num_classes, loss=_base_.model.head.loss)"
            why = "a linear classifier with the model's loss, because its own classifier is in the backbone"
        return [
            (CLASSIFICATION.format(kind='ViTLocalHead', head=head), f'one more layer, class token or mean, {why}'),
            (CLASSIFICATION.format(kind='DGLLocalHead', head=head), f"DGL's network, {why}"),
        ]
    return []


def _optim_wrapper(cfg: Config) -> tuple[str, str]:
    """Arguments of the child's optim wrapper, and what becomes of the stock one."""
    stock = cfg.get('optim_wrapper') or {}
    kind = type_name(stock, 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise LocalLearningError(f'optim_wrapper.type={kind} cannot be replaced by mmman.LocalLearningOptimWrapper')
    wrapper = "type='mmman.LocalLearningOptimWrapper'"
    if kind == 'AmpOptimWrapper' and not {'dtype', 'loss_scale'} & stock.keys():
        return (
            f"{wrapper}, dtype='float16'",
            'optim wrapper: mixed precision is an option of the local one; optimizer and clipping stay',
        )
    return wrapper, 'optim wrapper: optimizer, clipping and param-wise options stay'


def _kept(cfg: Config) -> list[str]:
    """What of the stock config a user should know to be in force."""
    kept = []
    hooks = [type_name(hook) for hook in cfg.get('custom_hooks') or []]
    if hooks:
        kept.append(f'kept: {", ".join(hooks)}')
    frozen = cfg.model.backbone.get('frozen_stages', -1)
    if frozen >= (1 if type_name(cfg.model.backbone) in ('ConvNeXt', 'VisionTransformer') else 0):
        kept.append(f'kept: frozen_stages={frozen}; what is frozen gets no local head, and K counts the rest')
    return kept


def _load(text: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'child.py')
        path.write_text(text)
        return Config.fromfile(path)


def _build_backbone(cfg: Config) -> nn.Module:
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)  # which also registers the library's modules
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg.model.backbone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stock', help='library::path of a stock config, or the path of a config file')
    parser.add_argument('-k', '--num-blocks', type=int, default=4, help='number of gradient-isolated blocks K (default: 4)')
    parser.add_argument('--partition', nargs='+', default=['stage'], help="'stage', 'uniform', or the last units of K-1 blocks")
    parser.add_argument('-o', '--out', type=Path, help='file to write; default: print the config')
    args = parser.parse_args()
    MMLogger.get_instance('localize_config', log_level='WARNING')

    stock = args.stock
    if '::' not in stock:
        if not Path(stock).is_file():
            raise SystemExit(f'no config at {stock}; give the path of a file, or library::path for one of a library')
        stock = str(Path(stock).resolve())
    partition = args.partition[0] if args.partition[0] in ('stage', 'uniform') else args.partition
    try:
        choice = localize(stock, args.num_blocks, partition)
    except LocalLearningError as error:
        raise SystemExit(f'{args.stock}: {error}') from None
    text = choice.text
    if args.out is None:
        print(text)
    else:
        if args.out.exists():
            raise SystemExit(f'{args.out} exists; choose another name or remove it')
        if '::' not in stock:  # a path that holds wherever both files move together
            text = text.replace(repr(stock), repr(os.path.relpath(stock, args.out.resolve().parent)))
        args.out.write_text(text)
        print(f'{args.out} is written')
    for reason in choice.reasons:
        print(f'- {reason}', file=sys.stderr)


if __name__ == '__main__':
    main()
