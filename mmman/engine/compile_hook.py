"""The hook that compiles the units of the backbone, and their copies in local heads, with ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmman.errors import ConfigError
from mmman.local.blocks import localized_backbone
from mmman.options import checked
from mmman.registry import HOOKS


@HOOKS.register_module()
@checked('LocalCompileHook')
class LocalCompileHook(Hook):
    """Compiles every unit of the backbone, and its copies in local heads, in place, before training starts.

    ``cfg.compile`` would compile the whole training step, which has the local backward passes in it. Units are compiled one
    by one. State dicts, checkpoints, evaluation and the trained model stay the same; copies of the model (``EMAHook``) aren't
    compiled. The first steps, and the first ones with images of another size, take as long as the compiler does.

    Args:
        options: Options of ``torch.compile``, such as ``dict(mode='max-autotune-no-cudagraphs')``. Default: torch's.

    Raises:
        ConfigError: The model has no localised backbone, or a unit is recomputed: what runs it twice can't be traced.
    """

    def __init__(self, options: Mapping | None = None) -> None:
        self.options = dict(options or {})

    def before_train(self, runner: Runner) -> None:
        """Compile the units. Nothing is traced before they run."""
        backbone = localized_backbone(runner.model.module if is_model_wrapper(runner.model) else runner.model)
        units = [unit for block in (backbone.local.plan.frozen, *backbone.local.plan.blocks) for unit in block]
        modules = [(unit.name, backbone.get_submodule(path)) for unit in units for path in unit.modules]
        if recomputed := [name for name, module in modules if 'forward' in vars(module)]:
            raise ConfigError(
                f'LocalCompileHook cannot compile units that are recomputed ({", ".join(dict.fromkeys(recomputed))}): leave '
                'them out of recompute and selective_recompute, or remove the hook'
            )
        copies = [copy for head in backbone.local.values() for copy in head.transfer.copies]
        modules = [*(module for _, module in modules), *copies]
        for module in modules:
            module.compile(**self.options)
        # units of one class share their code: each shape of it is compiled, in training, under no_grad and in evaluation
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 4 * len(modules))
        print_log(f'{len(units)} units and {len(copies)} copies in local heads are compiled when they run', logger='current')
