"""Loads trained models and their data for tools that analyse them: a checkpoint or work folder, its config, its batches."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmman.analysis.dummy_model import scope_of, without_pretrained
from mmman.errors import CheckpointError, ConfigError
from mmman.local.blocks import LocalBlocks
from mmman.local.localize import delocalize_
from mmman.messages import one_line
from mmman.runtime.checkpoint import load_from_local
from mmman.runtime.checkpoint_files import latest_checkpoint
from mmman.runtime.launch import set_mmpretrain_loaders
from mmman.runtime.stock_config import config_path


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint, in eval mode, on the GPU if there is one.

    Attributes:
        name: What tables and pictures call it.
        cfg: Its config.
        checkpoint: The file.
        work_dir: The folder that the checkpoint is in.
        model: The model.
    """

    name: str
    cfg: Config
    checkpoint: Path
    work_dir: Path
    model: BaseModel

    @classmethod
    def load(
        cls, path: Path, config: str | None = None, options: dict | None = None, name: str | None = None, stock: bool = True
    ) -> TrainedModel:
        """Find, build and load a model.

        Args:
            path: A checkpoint, or a work folder, whose newest checkpoint is used.
            config: ``library::path`` or the path of a file. None: the config beside the checkpoint.
            options: Overrides of the config, as in ``--cfg-options``.
            name: By default the last two parts of ``path``.
            stock: Whether to remove the local heads and leave the stock model.

        Raises:
            CheckpointError: There is no checkpoint, it can't be read, or its weights don't fit the config.
            ConfigError: There is no config, or not one.
        """
        checkpoint = latest_checkpoint(path) if path.is_dir() else path
        if checkpoint is None:
            raise CheckpointError(f'{path} has no checkpoint: give a .pth file, or the work folder of a training')
        checkpoint = Path(checkpoint)
        cfg = Config.fromfile(find_config(checkpoint) if config is None else config_path(config))
        cfg.merge_from_dict(options or {})
        if scope_of(cfg) == 'mmpretrain':
            set_mmpretrain_loaders(cfg)
        init_default_scope(scope_of(cfg))
        model_cfg = without_pretrained(cfg.model)
        if cfg.get('data_preprocessor'):
            model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = revert_sync_batchnorm(MODELS.build(model_cfg))
        if stock and isinstance(getattr(model.backbone, 'local', None), LocalBlocks):
            delocalize_(model.backbone)
        _load(model, checkpoint, stock)
        folder = path if path.is_dir() else path.parent
        name = name or '/'.join((folder.absolute() if path.is_dir() else path.absolute().with_suffix('')).parts[-2:])
        model.eval()
        return cls(name, cfg, checkpoint, folder, model.to(get_device()))

    def batches(self, images: int, batch_size: int, split: str = 'val') -> Iterator[dict]:
        """Batches of the config's data, as its data loader gives them, in a random order that is always the same.

        Many datasets are sorted by class, so their first images would not stand for the others.

        Args:
            images: Number of images, at least 1. The dataset may have fewer; a last, smaller batch is left out.
            batch_size: Images a batch, at least 1.
            split: ``'val'`` or ``'train'``.

        Raises:
            ConfigError: The config has no such data loader, its data can't be read, or there are fewer images than a batch.
        """
        key = f'{split}_dataloader'
        if not self.cfg.get(key):
            raise ConfigError(f'the config of {self.name} has no {key}: give another config (--configs)')
        loader = copy.deepcopy(self.cfg[key])
        loader.pop('batch_sampler', None)
        loader.batch_size, loader.drop_last = batch_size, True
        loader.sampler = dict(type='DefaultSampler', shuffle=True, seed=0)
        try:
            loader = Runner.build_dataloader(loader)
            count = min(images // batch_size, len(loader))
            if not count:
                found = min(images, len(loader.dataset))
                raise ConfigError(f'{found} images are no batch of {batch_size}: raise --images, or lower --batch-size')
            for _, batch in zip(range(count), loader, strict=False):
                yield batch
        except OSError as error:
            reason = one_line(f'{type(error).__name__}: {error}')
            raise ConfigError(f'{key} of {self.name}: {reason}; set the place of the data with --cfg-options') from error


def find_config(checkpoint: Path) -> Path:
    """The config that mmengine wrote beside a checkpoint: the only Python file of the folder, else that of its newest log.

    Raises:
        ConfigError: There is none.
    """
    beside = [*checkpoint.parent.glob('*.py')]
    logged = sorted(checkpoint.parent.glob('*/vis_data/config.py'))
    if len(beside) == 1:
        return beside[0]
    if logged:
        return logged[-1]
    raise ConfigError(f'{checkpoint.parent} has {len(beside)} configs beside the checkpoint: name the config (--configs)')


def _load(model: BaseModel, checkpoint: Path, stock: bool) -> None:
    """Load the weights. All of the model's must be there."""
    content = load_from_local(checkpoint)
    state = content.get('state_dict', content) if isinstance(content, dict) else {}
    if stock:
        state = {name: value for name, value in state.items() if not name.startswith('backbone.local.')}
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith('num_batches_tracked')]
    wrong = [name for name, value in state.items() if name not in own or value.shape != own[name].shape]
    if missing or wrong:
        what = f'it lacks {len(missing)} tensors of the model, e.g. {missing[0]}' if missing else f'{wrong[0]} does not fit'
        has_no_heads = missing and all('.local.' in name for name in missing)
        remedy = 'give a training checkpoint, which has local heads' if has_no_heads else 'name its config (--configs)'
        raise CheckpointError(one_line(f'{checkpoint} is not of this config: {what}; {remedy}'))
    model.load_state_dict(state, strict=False)


def add_model_arguments(
    parser: argparse.ArgumentParser, count: int | str, images: int | None, batch_size: int | None, has_numbers: bool = True
) -> None:
    """Add the arguments of tools that read trained models: the models, and the images that they run on.

    Args:
        parser: The parser of the tool.
        count: ``nargs`` of the models.
        images: Default of ``--images``. None: by default none are read.
        batch_size: Default of ``--batch-size``. None: there is no such option.
        has_numbers: Whether there is ``--out``.
    """
    parser.add_argument(
        'models', nargs=count, type=Path, metavar='CHECKPOINT|WORK_DIR', help='of a folder the newest checkpoint'
    )
    parser.add_argument('--configs', nargs='+', metavar='CONFIG', help='one for each model; default: the config beside it')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='what to call the models, one name for each')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='override settings of all configs'
    )
    parser.add_argument(
        '--images',
        type=positive,
        default=images,
        metavar='N',
        help=f'drawn at random, always the same; default: {images or "none"}',
    )
    if batch_size is not None:
        parser.add_argument('--batch-size', type=positive, default=batch_size, metavar='N', help=f'default: {batch_size}')
    if has_numbers:
        parser.add_argument('--out', type=Path, metavar='JSON', help='also write the numbers')


def positive(word: str) -> int:
    """Argument type of a number from 1."""
    if not word.isdigit() or not int(word):
        raise argparse.ArgumentTypeError(f'{word} is not a number from 1')
    return int(word)


def load_models(args: argparse.Namespace, stock: bool = True) -> list[TrainedModel]:
    """The models that the arguments of :func:`add_model_arguments` name.

    Raises:
        ConfigError: Another number of configs or names than of models; and what :meth:`TrainedModel.load` raises.
        CheckpointError: What :meth:`TrainedModel.load` raises.
    """
    for option in ('configs', 'names'):
        given = getattr(args, option)
        if given is not None and len(given) != len(args.models):
            raise ConfigError(f'--{option} has {len(given)} values for {len(args.models)} models: give one for each')
    none = [None] * len(args.models)
    return [
        TrainedModel.load(path, config, args.cfg_options, name, stock)
        for path, config, name in zip(args.models, args.configs or none, args.names or none, strict=True)
    ]


@torch.no_grad()
def preprocess(model: BaseModel, batch: dict, training: bool = False) -> dict:
    """A batch of a data loader as the model takes it: ``inputs`` (B, 3, H, W), normalised, and ``data_samples``."""
    return model.data_preprocessor(copy.deepcopy(batch), training)
