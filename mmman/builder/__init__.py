"""What a config names: the localised backbone, and models whose local heads follow their own head."""

from mmman.builder.backbone import LocalBackbone
from mmman.builder.model import LocalModel

__all__ = ['LocalBackbone', 'LocalModel']
