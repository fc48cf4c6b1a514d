"""Find out whether neck and heads of a detector run on a few images at a time."""

from __future__ import annotations

from dataclasses import dataclass

from mmengine.config import Config

from mmman.analysis.dummy_model import build_dummy_model
from mmman.errors import ConfigError
from mmman.memory.detection.dense_loss import why_not_dense
from mmman.memory.detection.losses import check_norms
from mmman.messages import one_line
from mmman.planning.choice import BY_CHUNK, SAME
from mmman.planning.profile import as_single_block


@dataclass(frozen=True)
class ChunkSupport:
    """Whether neck and heads of a model run on a few images at a time.

    Attributes:
        trains: How they then train: :data:`SAME` or :data:`BY_CHUNK`.
        obstacle: Why they can't. Empty if they can.
    """

    trains: str
    obstacle: str = ''


def chunk_support(cfg: Config, height: int, width: int) -> ChunkSupport:
    model, _ = build_dummy_model(as_single_block(cfg), height, width)
    try:
        check_norms(type(model).__name__, [part for name, part in model.named_children() if name != 'backbone'])
        return ChunkSupport(BY_CHUNK if why_not_dense(model) else SAME)
    except ConfigError as error:
        return ChunkSupport(SAME, one_line(str(error), 120))
