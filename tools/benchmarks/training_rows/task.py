"""What a task is: the named rows, the dataset, the recipe and the metrics that all rows of its table share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from training_rows.paper_rows import expand

CONFIGS = Path(__file__).resolve().parents[3] / 'configs'


@dataclass(frozen=True)
class RowSource:
    """Where the model of a row comes from: a config file or, by its name, a row of the paper; and overrides by dotted key."""

    config: Path | str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> Config:
        """The config with the overrides."""
        cfg = expand(self.config) if isinstance(self.config, str) else Config.fromfile(self.config)
        cfg.merge_from_dict(dict(self.overrides))
        return cfg


@dataclass(frozen=True)
class Metric:
    """A metric of which more is better.

    Attributes:
        key: Its key in mmengine's log.
        label: Its name in tables and figures.
        digits: Decimal places.
    """

    key: str
    label: str
    digits: int = 2


@dataclass(frozen=True)
class Recipe:
    """How all rows of a task are trained, unless the command line says otherwise.

    Attributes:
        unit: What ``length`` counts: ``'iterations'`` or ``'epochs'``.
        length: Length of a training.
        validations: Number of validations, evenly spaced; the last one ends the training.
        batch_size: Images per iteration.
        optimizer: Config of the optimizer, with its learning rate.
        schedule: Makes the learning rate schedulers for a length.
        clip_grad: Config of gradient clipping, or None.
    """

    unit: str
    length: int
    validations: int
    batch_size: int
    optimizer: dict
    schedule: Callable[[int], list[dict]]
    clip_grad: dict | None = None


@dataclass(frozen=True)
class Task:
    """A table of rows.

    Attributes:
        rows: Named rows.
        metrics: What validation measures. The first one is drawn and compared.
        recipe: How rows are trained; None: as their configs say.
        files: What has to be below the data's folder.
        set_data: Makes a config read the task's data, given the data's folder.
        fit_model: Fits the model of a config to the task, without pre-trained or frozen parts.
    """

    name: str
    rows: Mapping[str, RowSource]
    metrics: tuple[Metric, ...]
    recipe: Recipe | None = None
    files: tuple[str, ...] = ()
    set_data: Callable[[Config, Path], None] | None = None
    fit_model: Callable[[Config], None] | None = None


def stock_backbone(cfg: Config) -> ConfigDict:
    """The config of the backbone itself, whether it is trained end to end or locally."""
    return cfg.model.backbone.get('backbone', cfg.model.backbone)


def loader(dataset: dict, batch_size: int = 1, sampler: str = 'DefaultSampler', shuffle: bool = False) -> dict:
    """Config of a data loader. The sampler of an iteration-based training is ``'InfiniteSampler'``."""
    return {'batch_size': batch_size, 'num_workers': 0, 'dataset': dataset, 'sampler': {'type': sampler, 'shuffle': shuffle}}


def warmup_and_cosine(iterations: int, warmup: int = 50) -> list[dict]:
    """A linear warm-up, at most a tenth of the training, and a cosine to 0."""
    warmup = min(warmup, iterations // 10)
    cosine = {'type': 'CosineAnnealingLR', 'by_epoch': False, 'begin': warmup, 'end': iterations, 'T_max': iterations - warmup}
    linear = {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.01, 'begin': 0, 'end': warmup}
    return [linear, cosine] if warmup else [cosine]
