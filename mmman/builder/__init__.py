"""Components for configs: the localised backbone, and models whose local heads take their options from the model's head."""

from mmman.builder.backbone import LocalBackbone
from mmman.builder.model import LocalModel

__all__ = ['LocalBackbone', 'LocalModel']
