"""The method: cut a backbone into gradient-isolated blocks and train each one with a local head at its boundary."""

from mmman.local.local_head import Boundary, LocalHead
from mmman.local.localize import delocalize_, localize_
from mmman.local.transfer import MomentumTransfer

__all__ = ['Boundary', 'LocalHead', 'MomentumTransfer', 'delocalize_', 'localize_']
