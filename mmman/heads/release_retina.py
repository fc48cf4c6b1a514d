"""RetinaNet's head as the authors' code of MAN++ trains it. Requires mmdet, so a config imports it by ``custom_imports``."""

from __future__ import annotations

from mmdet.models.dense_heads import RetinaHead

from mmman.registry import MODELS


@MODELS.register_module()
class ReleaseRetinaHead(RetinaHead):
    """mmdet's ``RetinaHead`` whose losses are divided by max(positives of the batch, 1).

    mmdet divides by the sum over images of max(positives of the image, 1), so images without a positive anchor weaken the
    losses of all others.
    """

    def get_targets(self, *args, **kwargs) -> tuple:
        """As in ``AnchorHead``, with another ``avg_factor``."""
        labels, label_weights, box_targets, box_weights, _, *rest = super().get_targets(*args, **kwargs)
        count = sum(int(((own >= 0) & (own < self.num_classes)).sum()) for own in labels)
        return (labels, label_weights, box_targets, box_weights, max(count, 1), *rest)
