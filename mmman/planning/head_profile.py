"""Measure the cost of a local head after any unit of a backbone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.trace import Trace
from mmman.errors import CostError
from mmman.heads.det import DetLocalHead
from mmman.local import delocalize_, localize_
from mmman.local.local_head import LocalHead
from mmman.planning.costs import HeadCost, RecomputeMode
from mmman.planning.probe_runs import ProbeBatch, ProbeRuns, gradient_bytes, outputs_observed, static_bytes

FOLLOWING = 3
"""Heads count as equal only if the same number of units follows, up to this number."""


class HeadCosts:
    """Costs of local heads. A head is built and run when its cost is first requested; equal heads are run once.

    Two heads are equal if they see the same shapes and copy units of the same structure. Heads of detectors must also predict
    on the same levels. Some heads copy more layers (AugLocal, ViT); those layers are assumed to be equal if the same number of
    units follows, see :data:`FOLLOWING`.

    Args:
        runs: The model and the probe batches.
        options: Options of ``mmman.LocalBackbone``.
        state: Bytes of optimizer state per byte of trained parameters.
        mode_options: Options of ``mmman.LocalBackbone`` for each recompute mode.

    Raises:
        CostError: The transfer copies another unit than the next one, or local losses train several blocks.
    """

    def __init__(self, runs: ProbeRuns, options: dict, state: float, mode_options: Mapping[RecomputeMode, dict]) -> None:
        if (options.get('transfer') or {}).get('source_unit', 'next') != 'next':
            raise CostError(
                "plans assume copies of the next block's first unit: set transfer.source_unit='next', or name the cuts"
            )
        if options.get('window', 1) > 1:
            raise CostError('plans assume that one block is alive at a time: set window=1, or name the cuts')
        self.runs, self.chain, self.state, self.mode_options = runs, runs.chain, state, mode_options
        self.options = {k: v for k, v in options.items() if k not in ('partition', 'loss_weight')}
        backbone = runs.model.backbone
        self._outputs: list[dict[int, Tensor]] = []
        for batch in runs.batches:
            outputs: dict[int, Tensor] = {}
            observed = outputs_observed(backbone, self.chain, outputs.__setitem__)
            with observed, torch.no_grad(), FloatKernels(), runs.precision():
                backbone(batch.inputs)
            self._outputs.append(outputs)
        self._stock = delocalize_(copy.deepcopy(backbone))
        self._known: dict[Hashable, HeadCost] = {}
        self.strides = self._strides()

    def __call__(self, cut: int, larger: int | None, is_smallest: bool, mode: RecomputeMode) -> HeadCost:
        asked = (cut, larger, is_smallest, mode)
        if asked not in self._known:
            kind = (self._kind(cut), larger, is_smallest, mode)
            if kind not in self._known:
                head = self._build(*asked)
                alike = (kind[0], tuple(getattr(head, 'level_strides', ())), mode)
                if alike not in self._known:
                    self._known[alike] = self._cost(head, cut)
                self._known[kind] = self._known[alike]
            self._known[asked] = self._known[kind]
        return self._known[asked]

    def _strides(self) -> tuple[int, ...]:
        """The stride that a detector's local head sees after each unit; 1 everywhere for heads that don't depend on strides."""
        candidates = range(max(self.chain.out_units))
        first = next(i for i, unit in enumerate(self.chain.units) if unit.is_trainable(self._stock))
        head = self._localised([first], mode=RecomputeMode.NONE).local.values()
        if not isinstance(next(iter(head)), DetLocalHead):
            return (1,) * len(self.chain.units)
        reads_next = next(iter(head)).transfer.copies != []
        side = self.runs.batches[0].inputs.shape[-1]
        outputs = self._outputs[0]
        strides = []
        for i in candidates:
            output = outputs[i + reads_next]
            tokens = output.shape[1] - self.chain.extra_tokens
            strides.append(round(side / (output.shape[-1] if output.dim() == 4 else tokens**0.5)))
        return (*strides, *(strides[-1:] * (len(self.chain.units) - len(strides))))

    def _kind(self, cut: int) -> Hashable:
        """A key: the structure of the copied unit, its input and output shapes, and the number of following units, capped."""
        unit = self.chain.units[cut + 1].of(self.runs.model.backbone)
        modules = tuple((type(module), 'forward' in vars(module)) for module in unit.modules())
        tensors = tuple(tensor.shape for tensor in unit.state_dict().values())
        following = min(len(self.chain.units) - cut - 2, FOLLOWING)
        return modules, tensors, self._outputs[0][cut].shape, self._outputs[0][cut + 1].shape, following

    def _localised(self, cuts: list[int], mode: RecomputeMode) -> nn.Module:
        names = [self.chain.units[cut].name for cut in cuts]
        options = {**self.options, **self.mode_options[mode]}
        with quiet():
            backbone = localize_(copy.deepcopy(self._stock), partition=names, **options)
        backbone.train()
        return backbone

    def _build(self, cut: int, larger: int | None, is_smallest: bool, mode: RecomputeMode) -> LocalHead:
        cuts = {cut}
        if larger is not None:
            cuts.add(self.strides.index(larger))
        if not is_smallest:
            cuts.add(next(i for i, s in enumerate(self.strides) if s < self.strides[cut] and self._is_trainable(i)))
        backbone = self._localised(sorted(cuts), mode)
        backbone.local.sync_modes(backbone)
        head = backbone.local[self.chain.units[cut].name.replace('.', '_')]
        head.session = SimpleNamespace(model=self.runs.model)
        return head

    def _is_trainable(self, i: int) -> bool:
        return self.chain.units[i].is_trainable(self._stock)

    def _cost(self, head: LocalHead, cut: int) -> HeadCost:
        model = self.runs.model
        chunked = self.runs.chunked
        losses = head.loss if chunked is None else partial(chunked.local_losses, head)
        outputs = {id(batch): own[cut] for batch, own in zip(self.runs.batches, self._outputs, strict=True)}

        def run(batch: ProbeBatch, trace: Trace) -> None:
            x = outputs[id(batch)].detach().requires_grad_()
            head.zero_grad()
            if chunked is not None:
                with torch.no_grad(), self.runs.precision():
                    losses(head.apply_transfer(x, batch.inputs), batch.inputs, batch.samples, dry_run=True)
            trace.begin()
            with self.runs.precision():
                loss, _ = model.parse_losses(losses(head.apply_transfer(x, batch.inputs), batch.inputs, batch.samples))
            loss.backward()
            trace.mark('end')

        costs = self.runs.extrapolate(run, head, self._outputs)
        gradients = gradient_bytes(head.parameters())
        peak = costs.peak('start', 'end')
        work = costs.flops('end'), costs.operators('end'), costs.nanoseconds('end')
        return HeadCost(static_bytes(head, self.state), peak, gradients, *work)


@contextmanager
def quiet(least: int = logging.WARNING) -> Iterator[None]:
    """Raise the log level to ``least`` inside this context. Localising a backbone logs a line otherwise."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)
