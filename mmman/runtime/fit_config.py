"""Fits a config into a memory budget: reads it, predicts what it can be trained with, writes and measures the choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmman.analysis.dummy_model import build_dummy_model, library_of, random_batch
from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.roofline import Device
from mmman.analysis.sizes_only import SizesOnly
from mmman.analysis.training import StepMeter
from mmman.errors import ConfigError
from mmman.memory.detection.focal_loss import fused_focal_loss
from mmman.planning.choice import LOCAL, Changes, FitRow, Limits
from mmman.planning.fit import BLOCKS, FitCase, predict_rows, supports_option
from mmman.planning.train_images import image_size, images_per_step
from mmman.runtime.launch import type_name
from mmman.runtime.localized_child import (
    WRAPPER,
    child_text,
    localize,
    read_child,
    run_dry_step,
)
from mmman.runtime.recipes import Recipe, check_source
from mmman.runtime.stock_config import StockConfig


@dataclass(frozen=True)
class ConfigFit:
    """A config to fit.

    Attributes:
        source: The config.
        case: What rows are predicted for.
        recipe: The recommended local heads. None: the config is localised, and keeps its own.
        folder: The folder of the config to write. None: anywhere.
        batch: Images per step, if not those of the config.
    """

    source: StockConfig
    case: FitCase
    recipe: Recipe | None
    folder: Path | None
    batch: int | None

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path | None = None,
        batch: int | None = None,
        shape: tuple[int, int] | None = None,
        frozen_stages: int | None = None,
        images_per_chunk: int | None = None,
        dry_run: bool = True,
        device: Device | None = None,
    ) -> ConfigFit:
        """Read a config, and choose its local heads by a training step on two small random images.

        Args:
            name: ``library::path`` of a library's config, or the path of a file.
            folder: See :class:`ConfigFit`.
            batch, shape: Images per step; their height and width, pixels. Default: the config's own.
            frozen_stages: Replaces the option of the stock backbone. Default: it is kept.
            images_per_chunk: See :class:`FitCase`.
            dry_run: Whether the local heads have to make a training step.
            device: See :class:`FitCase`.

        Raises:
            LocalLearningError: The config can't be read, doesn't tell the batch or the image size, or doesn't support local
                learning.
        """
        source = StockConfig.read(name)
        check_source(source)
        stock = {} if frozen_stages is None else {'frozen_stages': frozen_stages}
        backbone = source.cfg.model.backbone
        is_localized = type_name(backbone) == 'LocalBackbone'
        scope = library_of(source.cfg)
        init_default_scope(scope)
        images = batch or images_per_step(source.cfg)
        height, width = shape or image_size(source.cfg, scope)
        if stock and not supports_option(backbone.backbone if is_localized else backbone, 'frozen_stages'):
            raise ConfigError(f'--frozen-stages: the backbone of {name} has no option frozen_stages')
        if is_localized:
            cfg, recipe = read_child(name, child_text(source, folder, Changes(stock)), folder), None
        else:
            child = localize(source, Changes(stock, {'num_blocks': 2}), folder, dry_run)
            cfg, recipe = child.cfg, child.recipe
        wrapper = {key: cfg.optim_wrapper[key] for key in ('type', 'update', 'dtype') if key in cfg.optim_wrapper}
        cfg = with_cpu_precision(cfg)
        case = FitCase(cfg, stock, wrapper, images, height, width, images_per_chunk, is_localized, device)
        own_batch = (source.cfg.get('train_dataloader') or {}).get('batch_size')
        return cls(source, case, recipe, folder, None if batch == own_batch else batch)

    def rows(
        self,
        limits: Limits,
        blocks: Sequence[int] = BLOCKS,
        partition: str | Sequence[str] | None = None,
        report: Callable[[str, float], None] = lambda what, done: None,
    ) -> Iterator[FitRow]:
        """Predict the rows; see :func:`predict_rows`. mmdet's focal loss has the memory of the operator that a GPU runs."""
        with self._focal_loss():
            yield from predict_rows(self.case, limits, blocks, partition, report)

    def text(self, row: FitRow, base: FitRow) -> str:
        """The child config of a row, with its prediction in a comment; ``base`` is the row of the config as it is."""
        batch, height, width = self.case.shape
        header = [f'{row.name}; trains {row.trains}.' if row is not base else f'{row.name}.']
        if row.peak is not None:
            header.append(
                f'Predicted for {batch} images of {height}x{width}: peak {row.peak.total / 1e6:.1f} MB of tensors '
                f'({row.peak.total / base.peak.total - 1:+.1%}), FLOPs {row.flops / base.flops - 1:+.1%}.'
            )
            if row.time:
                header.append(f'Estimated time on {self.case.device.name}: {row.time / base.time - 1:+.0%}.')
        if row.trains == LOCAL and self.recipe:
            header.append(f'Local head: {self.recipe.why}.')
        return child_text(self.source, self.folder, row.changes, self.recipe, self.batch, header)

    def check(self, row: FitRow, text: str) -> list[str]:
        """Read the child of a row and, if it changes the backbone, run a training step of it on two small random images.

        Returns:
            What a user should know of it.

        Raises:
            LocalLearningError: The child doesn't train.
        """
        if row.trains == LOCAL and self.recipe:
            return localize(self.source, row.changes, self.folder, True, self.recipe).reasons
        child = read_child(self.source.name, text, self.folder)
        return run_dry_step(child, self.source.cfg) if row.changes.local else []

    def measured_peak(self, text: str) -> tuple[int, int | None]:
        """Take training steps of a child config on random images of the full size and batch.

        Detectors compute a real step, on a GPU if there is one. Classifiers and segmentors only count sizes without a GPU.

        Returns:
            Peak bytes of live tensors; and of torch's allocator on a GPU, else None.
        """
        cfg, has_gpu = read_child(self.source.name, text, self.folder), torch.cuda.is_available()
        cfg = cfg if has_gpu else with_cpu_precision(cfg)
        cfg.default_scope, (batch, height, width) = self.case.localized.default_scope, self.case.shape
        sizes_only = None if has_gpu or cfg.default_scope == 'mmdet' else SizesOnly()
        model, optim_wrapper = build_dummy_model(cfg, height, width, sizes_only)
        if has_gpu:
            model.cuda()
        data = random_batch(model, cfg.default_scope, batch, height, width)
        with self._focal_loss(), nullcontext() if has_gpu else FloatKernels(), sizes_only or nullcontext():
            meter = StepMeter(model, optim_wrapper, data)
            return meter.memory().peak, meter.allocator_peak()

    def _focal_loss(self):
        return fused_focal_loss() if self.case.is_detector else nullcontext()


def with_cpu_precision(cfg: Config) -> Config:
    """Copy a config, with bfloat16 in place of float16, and an optim wrapper that runs it on a CPU."""
    cfg = copy.deepcopy(cfg)
    cfg.default_scope = library_of(cfg)
    wrapper = cfg.optim_wrapper
    if {'dtype', 'loss_scale'} & wrapper.keys() or type_name(wrapper, 'OptimWrapper') == 'AmpOptimWrapper':
        wrapper.pop('loss_scale', None)
        wrapper.update(type=WRAPPER, dtype='bfloat16')
        if type_name(cfg.model.backbone) != 'LocalBackbone':
            cfg.model.backbone = dict(type='mmman.LocalBackbone', backbone=cfg.model.backbone, num_blocks=1)
    return cfg
