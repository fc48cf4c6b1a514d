"""What localising adds to a backbone: one module, ``backbone.local``, that holds the local heads by the unit they sit on."""

from __future__ import annotations

import re

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, ModuleDict
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmman.errors import MisuseError
from mmman.local.local_head import LocalHead
from mmman.local.session import Session
from mmman.partition import Chain, Plan


class LocalBlocks(ModuleDict):
    """The local heads of blocks 1 to K-1, keyed by the block's last unit (``layer1_1``).

    The key, and so every key of the state dict, names the cut and not the block's number: a checkpoint's heads fit another K
    exactly where the cuts are the same.

    Args:
        chain: The backbone's units.
        plan: Its blocks.
        heads: Local heads of the first K-1 blocks, in order.
    """

    def __init__(self, chain: Chain, plan: Plan, heads: list[LocalHead]) -> None:
        super().__init__({block[-1].name.replace('.', '_'): head for block, head in zip(plan.blocks[:-1], heads, strict=True)})
        self.plan = plan
        self.session: Session | None = None
        self.only: int | None = None  # the one head, from 0, that trains here, where the blocks are in several processes
        self.tapped = tuple(dict.fromkeys(chain.units[tap] for tap in chain.taps))
        self.unfilled: list[str] | None = None  # stock tensors that pretrained weights didn't bring, once some were loaded
        self._init_info: dict | None = None  # mmengine's, while the model that this is part of initialises its weights
        self._initial: dict[str, Tensor] = {}  # what the heads' tensors started as, until the model is done
        self._loaded: set[str] = set()  # the heads that a state dict brought whole
        last = {unit.name for unit in plan.blocks[-1]}
        inner = {i for i, tap in enumerate(chain.taps) if chain.units[tap].name not in last}
        self._plain_inner_taps = inner - chain.norms.keys()
        self.inner_norms = tuple(dict.fromkeys(path for i, path in chain.norms.items() if i in inner))

    @property
    def _params_init_info(self) -> dict:
        """What mmengine gives to every module when a model begins to initialise its weights, and takes away when it ends.

        The end is what matters here: the heads have to be initialised by then, whatever ``init_weights`` of the backbone and
        of the model do. Most call it for all of their children, in order. Some (mmdet's and mmseg's Swin) leave their children
        out: the heads are initialised last. Others write over what their children started with: it is put back.
        """
        if self._init_info is None:
            raise AttributeError('_params_init_info')
        return self._init_info

    @_params_init_info.setter
    def _params_init_info(self, info: dict) -> None:
        self._init_info = info

    @_params_init_info.deleter
    def _params_init_info(self) -> None:
        if not self.is_init:
            self.init_weights()
        self._restore_initial()
        self._init_info = None

    def init_weights(self) -> None:
        """Initialise all heads. Called while the model initialises its weights, once; a second call does nothing."""
        is_first = not self.is_init
        super().init_weights()
        if is_first and self._init_info is not None:
            copied = {id(tensor) for head in self.values() for unit in head.unit_copies for tensor in _tensors(unit).values()}
            self._initial = {n: t.detach().clone() for n, t in _tensors(self).items() if id(t) not in copied}

    @torch.no_grad()
    def _restore_initial(self) -> None:
        own = _tensors(self)
        changed = [name for name, value in self._initial.items() if not torch.equal(own[name], value)]
        for name in changed:
            own[name].copy_(self._initial[name])
        if changed:
            print_log(
                f'init_weights of the model or its backbone changed {len(changed)} tensors of local heads, e.g. {changed[0]}, '
                'after the heads had initialised them: they are as the heads initialised them again',
                logger='current',
            )
        self._initial = {}

    def uninitialised(self) -> list[str]:
        """The heads with an initialisation of their own that was never run, and that no state dict brought, by their keys."""
        if self.is_init:
            return []
        return [key for key, head in self.items() if key not in self._loaded and _has_initialisation(head)]

    def trained(self) -> list[LocalHead]:
        """The heads that this process trains: all of them, but for a stage of a pipeline."""
        heads = [*self.values()]
        return heads if self.only is None else heads[self.only : self.only + 1]

    def open(self, session: Session) -> None:
        """Attach a session to every boundary."""
        self.session = session
        for head in self.trained():
            head.session = session

    def close(self) -> None:
        self.session = None
        for head in self.values():
            head.session = None

    def sync_modes(self, backbone: nn.Module) -> None:
        """Bring every local head into the mode it trains in; ``norm_eval`` of the backbone reaches into heads as well."""
        for head in self.values():
            head.train(backbone.training)
            head.transfer.follow_(head.source.of(backbone))

    def detach_taps(self, backbone: nn.Module, args: tuple, outputs: tuple | list) -> tuple | list | None:
        """Forward hook of the backbone: in a session, outputs from inside a non-final block carry no gradient."""
        if self.session is None or not self._plain_inner_taps:
            return None
        return type(outputs)(
            tree_map_only(Tensor, Tensor.detach, out) if i in self._plain_inner_taps else out for i, out in enumerate(outputs)
        )

    def detach_norm_input(self, norm: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of a norm on outputs: in a session it trains with the neck, the block in front of it doesn't.

        A norm may serve outputs of non-final blocks and of the final one: the latter come after the last boundary.
        """
        if self.session is None or not self.session.is_pending:
            return None
        return (args[0].detach(), *args[1:])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Weight initialisation (``init_cfg``) loads the stock backbone alone: heads in its file were trained for another task.

        ``local`` is the backbone's last child, so what the stock tensors missed is known here.
        """
        if prefix == 'local.' and hasattr(self, '_params_init_info'):  # which mmengine sets while it initialises weights
            state_dict.clear()
            state_dict.update(self.state_dict(prefix=prefix))
            self.unfilled = [*missing_keys, *re.findall(r'size mismatch for (\S+):', ' '.join(error_msgs))]
        else:
            for key, head in self.items():
                names = [f'{prefix}{key}.{name}' for name in head.state_dict() if not name.startswith('transfer.')]
                self._loaded |= {key} if all(name in state_dict for name in names) else set()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)


def _has_initialisation(head: LocalHead) -> bool:
    """Whether ``init_weights`` changes anything of a head but its momentum transfer, which is copied from the backbone."""
    copied, plain = set(head.transfer.modules()), BaseModule.init_weights
    return any(
        bool(getattr(module, 'init_cfg', None)) or getattr(type(module), 'init_weights', plain) is not plain
        for module in head.modules()
        if module not in copied
    )


def localized_backbone(model: nn.Module) -> nn.Module:
    """The localised backbone in ``model``.

    Raises:
        MisuseError: There is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(getattr(module, 'local', None), LocalBlocks)]
    if len(found) != 1:
        raise MisuseError(
            f'{type(model).__name__} has {len(found)} localised backbones, exactly one is needed: '
            "set model.backbone = dict(type='mmman.LocalBackbone', backbone=<the stock backbone>, ...)"
        )
    return found[0]
