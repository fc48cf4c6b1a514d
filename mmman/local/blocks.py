"""The module that localising adds to a backbone: ``backbone.local`` holds the local heads, keyed by the unit they follow."""

from __future__ import annotations

import re

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmman.errors import ConfigError
from mmman.initialisation import InitialisedOnce
from mmman.local.local_head import LocalHead
from mmman.local.session import Session
from mmman.partition import Chain, Plan


class LocalBlocks(InitialisedOnce):
    """The local heads of blocks 1 to K-1, keyed by the block's last unit (``layer1_1``).

    Keys, also in the state dict, name the cut and not the block's number: a checkpoint's heads load for another K if the cuts
    match.

    Args:
        chain: The backbone's units.
        plan: The blocks of the backbone.
        heads: Local heads of the first K-1 blocks, in order.
        window: Number of blocks that a local loss trains, from 1 to K.
    """

    def __init__(self, chain: Chain, plan: Plan, heads: list[LocalHead], window: int = 1) -> None:
        super().__init__({block[-1].name.replace('.', '_'): head for block, head in zip(plan.blocks[:-1], heads, strict=True)})
        self.plan = plan
        self.window = window
        self.session: Session | None = None
        self.trained_index: int | None = None  # in a pipeline stage: the index, from 0, of the only head trained here
        self.output_units = tuple(dict.fromkeys(chain.units[tap] for tap in chain.out_units))
        self.missing_pretrained: list[str] | None = None  # stock tensors missing from the pretrained weights, once loaded
        self._loaded_heads: set[str] = set()  # the heads that a state dict loaded completely
        last = {unit.name for unit in plan.blocks[-1]}
        inner = {i for i, tap in enumerate(chain.out_units) if chain.units[tap].name not in last}
        self._detached_outputs = inner - chain.norms.keys()
        self.inner_norms = tuple(dict.fromkeys(path for i, path in chain.norms.items() if i in inner))

    def tensors_to_initialise(self) -> dict[str, Tensor]:
        """All but the copies of units, whose values come from the backbone."""
        copies = (unit for head in self.values() for unit in head.unit_copies)
        copied = {id(tensor) for unit in copies for tensor in unit.state_dict(keep_vars=True).values()}
        return {name: tensor for name, tensor in super().tensors_to_initialise().items() if id(tensor) not in copied}

    def uninitialised(self) -> list[str]:
        """Keys of heads that define an initialisation which never ran, and that no state dict loaded."""
        if self.is_init:
            return []
        return [key for key, head in self.items() if key not in self._loaded_heads and _has_initialisation(head)]

    def trained_heads(self) -> list[LocalHead]:
        """The heads that this process trains: all of them, except in a pipeline stage."""
        heads = [*self.values()]
        return heads if self.trained_index is None else heads[self.trained_index : self.trained_index + 1]

    def attach_session(self, session: Session) -> None:
        """Attach a session to every boundary."""
        self.session = session
        for head in self.trained_heads():
            head.attach_session(session)

    def detach_session(self) -> None:
        self.session = None
        for head in self.values():
            head.attach_session(None)

    def sync_modes(self, backbone: nn.Module) -> None:
        """Set the train/eval mode of every local head; ``norm_eval`` of the backbone also applies to the copies in heads."""
        for head in self.values():
            head.train(backbone.training)
            head.transfer.sync_mode_(head.source.of(backbone))

    def detach_outputs(self, backbone: nn.Module, args: tuple, outputs: tuple | list) -> tuple | list | None:
        """Forward hook of the backbone. In a session, it detaches outputs that are taken from inside a non-final block."""
        if self.session is None or not self._detached_outputs:
            return None
        return type(outputs)(
            tree_map_only(Tensor, Tensor.detach, out) if i in self._detached_outputs else out for i, out in enumerate(outputs)
        )

    def detach_norm_input(self, norm: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of a norm on outputs. In a session, the neck's loss trains the norm but not the block before it.

        One norm may process outputs of non-final blocks and of the final block; the latter come after the last boundary.
        """
        if self.session is None or not self.session.is_pending:
            return None
        return (args[0].detach(), *args[1:])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Ignore heads in the file when weight initialisation (``init_cfg``) loads it: they were trained for another task.

        ``local`` is the backbone's last child, so ``missing_keys`` already lists the stock tensors that were not loaded.
        """
        if prefix == 'local.' and self.is_initialising:
            state_dict.clear()
            state_dict.update(self.state_dict(prefix=prefix))
            self.missing_pretrained = [*missing_keys, *re.findall(r'size mismatch for (\S+):', ' '.join(error_msgs))]
        else:
            for key, head in self.items():
                names = [f'{prefix}{key}.{name}' for name in head.state_dict() if not name.startswith('transfer.')]
                self._loaded_heads |= {key} if all(name in state_dict for name in names) else set()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _has_initialisation(head: LocalHead) -> bool:
    """Whether ``init_weights`` changes any part of a head except the momentum transfer, which is copied from the backbone."""
    copied, plain = set(head.transfer.modules()), BaseModule.init_weights
    return any(
        bool(getattr(module, 'init_cfg', None)) or getattr(type(module), 'init_weights', plain) is not plain
        for module in head.modules()
        if module not in copied
    )


def localized_backbone(model: nn.Module) -> nn.Module:
    """Return the localised backbone in ``model``.

    Raises:
        ConfigError: The model has none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(getattr(module, 'local', None), LocalBlocks)]
    if len(found) > 1:
        raise ConfigError(
            f'{type(model).__name__} has {len(found)} localised backbones, but exactly one is supported, not a copy of it as a '
            'teacher or momentum encoder: train the detector or classifier alone, or this model without mmman.LocalBackbone'
        )
    if not found:
        raise ConfigError(
            f'{type(model).__name__} has 0 localised backbones, but exactly one is required: '
            "set model.backbone = dict(type='mmman.LocalBackbone', backbone=<the stock backbone>, ...)"
        )
    return found[0]
