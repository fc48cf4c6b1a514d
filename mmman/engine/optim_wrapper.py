"""The optim wrapper for local learning: runs all backward passes and optimizer steps, with local losses and mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.engine.block_groups import BlockGroups
from mmman.engine.block_parameters import parameters_by_block
from mmman.engine.checks import check_model, check_window
from mmman.engine.clipping import check_clipping
from mmman.engine.local_losses import LocalLossLog
from mmman.engine.precision import autocast_dtype, make_loss_scaler
from mmman.engine.stride_check import check_strides_once
from mmman.engine.window import WindowSession
from mmman.errors import ConfigError
from mmman.experimental.cuda_graphs import CUDAGraphCapturer, StepGraphs
from mmman.local.blocks import localized_backbone
from mmman.local.session import Session
from mmman.memory.detection.dense_loss import ChunkedLoss, why_not_dense
from mmman.memory.model_loss import chunked_loss
from mmman.options import Count, Positive, checked
from mmman.registry import OPTIM_WRAPPERS

if TYPE_CHECKING:
    from mmman.parallel import BlockReducer, LocalDistributedDataParallel


@OPTIM_WRAPPERS.register_module()
@checked('optim_wrapper', injected=('optimizer',))
class LocalLearningOptimWrapper(OptimWrapper):
    """Trains a localised model: back-propagates every local loss at its boundary, and steps once per iteration.

    Gradient accumulation, clipping and param-wise options work as in mmengine. Mixed precision is an option of this wrapper,
    with the keywords of mmengine's ``AmpOptimWrapper``.

    Args:
        optimizer: The optimizer over all of the model's parameters, including those of the local heads.
        clip_scope: The parameters over which one gradient norm is computed, if ``clip_grad`` clips by norm. ``'block'``: one
            norm for each of the first K-1 blocks with its local head, and one for the final block with neck and head. No
            block's loss then scales another block's step. ``'global'``: all parameters, as the stock wrapper does.
        update: When a block steps. ``'synchronous'``: all blocks together, after the backward pass of the task loss.
            ``'immediate'``: each block right after its own backward pass, and its gradients are freed; in data parallel
            training at the next boundary, when its gradients are reduced. Both give the same parameters if the optimizer
            updates each parameter independently, as torch's do. With ``'immediate'``, a non-finite local loss is detected
            after the first K-1 blocks have stepped.
        images_per_chunk: Number of images for which everything behind the backbone runs forward and backward at a time, so that
            only one chunk's activations are alive; BatchNorm in training mode is refused there. With heads like RetinaNet's,
            FCOS's and ATSS's, losses and gradients are those of the whole batch. Other models (two-stage, mask, query-based)
            normalise the losses of each chunk by itself, as if the images were spread over more GPUs. The dense heads of
            blocks run on as many images as have no more positions, exactly. None: the whole batch in one pass.
        cuda_graphs: Run the steps of a detector with RetinaNet-like heads as CUDA graphs, on one GPU. Graphs are captured once
            for each batch shape and replayed from then on, so that kernel launches on the CPU don't limit a fast GPU. Not
            with gradient accumulation or a loss scaler.
        dtype: ``'float16'`` or ``'bfloat16'`` (or the torch dtype) to run the forward pass under autocast. None: full
            precision, unless ``loss_scale`` implies float16. On a CPU, autocast supports bfloat16 only.
        loss_scale: ``'dynamic'``, a fixed number, or a dict of ``torch.amp.GradScaler`` options. Default: dynamic for
            float16, none for bfloat16.
        accumulative_counts, clip_grad: See :class:`mmengine.optim.OptimWrapper`.

    Attributes:
        steps: Number of optimizer steps. Iterations that accumulate and steps that the loss scaler skips don't count.

    Raises:
        ConfigError: An option is not supported; or, at the first iteration, the model can't be trained with these options.
        NonFiniteLossError: A local loss is NaN or infinite. Under a loss scaler the step is skipped with a warning instead.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulative_counts: Count = 1,
        clip_grad: dict | None = None,
        clip_scope: Literal['block', 'global'] = 'block',
        update: Literal['synchronous', 'immediate'] = 'synchronous',
        images_per_chunk: Count | None = None,
        cuda_graphs: bool = False,
        dtype: Literal['float16', 'bfloat16', torch.float16, torch.bfloat16] | None = None,
        loss_scale: Literal['dynamic'] | Positive | dict | None = None,
        use_fsdp: bool = False,
    ) -> None:
        check_clipping(clip_grad)
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad)
        if cuda_graphs and accumulative_counts != 1:
            raise ConfigError('cuda_graphs=True overwrites gradients in every step: set accumulative_counts=1')
        if update == 'immediate' and clip_grad and clip_scope == 'global' and self.grad_name == 'grad_norm':
            raise ConfigError(
                "update='immediate' never has all gradients at once: clip_scope='global' requires update='synchronous'"
            )
        if use_fsdp:
            raise ConfigError('use_fsdp is not supported: local learning trains models in one process or under DDP')
        self.clip_scope = clip_scope
        self.update = update
        self.images_per_chunk = images_per_chunk
        self.cuda_graphs = cuda_graphs
        self.dtype = autocast_dtype(dtype, loss_scale)
        self.loss_scaler, self._fixed_scale = make_loss_scaler(self.dtype, loss_scale)
        if update == 'immediate' and self.loss_scaler is not None:
            raise ConfigError(
                "update='immediate' steps before a loss scaler knows that all gradients are finite: "
                "choose dtype='bfloat16' or update='synchronous'"
            )
        if cuda_graphs and self.loss_scaler is not None:
            raise ConfigError("cuda_graphs=True does not support a loss scaler: choose dtype='bfloat16' or cuda_graphs=False")
        self.steps = 0
        optimizer.register_step_post_hook(self._count_step)
        self._model: nn.Module | None = None
        self._backbone: nn.Module | None = None
        self._ddp: LocalDistributedDataParallel | None = None
        self._blocks: BlockGroups | None = None
        self._chunked: ChunkedLoss | None = None
        self._graphs: StepGraphs | None = None
        self._windows: WindowSession | None = None  # of this iteration, if local losses train several blocks
        self._pending_block: int | None = None  # the block whose gradients are being reduced; it steps at the next boundary
        self._local_log: dict[str, Tensor] = {}
        self._loss_log = LocalLossLog(is_scaled=self.loss_scaler is not None)

    @property
    def graph_bytes(self) -> int:
        """GPU memory of the CUDA graphs, in bytes."""
        return 0 if self._graphs is None else self._graphs.capturer.nbytes()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a forward pass: gradient synchronisation, autocast and the local learning session.

        Args:
            model: The model, or its DDP wrapper.
        """
        module = model.module if is_model_wrapper(model) else model
        if module is not self._model:
            check_model(model, self.update)
            check_strides_once(module)
            check_window(localized_backbone(module).local.window, self.update, self.images_per_chunk, self.cuda_graphs)
            self._model, self._backbone = module, localized_backbone(module)
            *blocks, _ = parameters_by_block(module)
            self._blocks = BlockGroups(self.optimizer, [block.values() for block in blocks])
            self._chunked = self._chunked_loss(module)
            self._graphs = None
        if self.cuda_graphs and self._graphs is None:
            self._graphs = self._step_graphs(model)
        self._ddp = model if hasattr(model, 'block_reducers') else None
        self._pending_block = None
        local = self._backbone.local
        local.sync_modes(self._backbone)
        precision = nullcontext() if self.dtype is None else autocast(dtype=self.dtype)
        self._windows = None
        session = Session(module, local, self.local_backward, self._chunked)
        if local.window > 1:
            session = self._windows = WindowSession(module, local, self.local_backward, self._propagate)
        if self.cuda_graphs:
            session.strategy = self._graphs.strategy_for(session)
        with super().optim_context(model), precision, session:
            yield
        self._local_log = session.log

    def local_backward(self, loss: Tensor, block: int) -> None:
        """Back-propagate a local loss, scaled like the task loss, without counting an iteration.

        Args:
            loss: A scalar.
            block: The block that the loss trains, 1 to K-1.
        """
        self._back_propagate(loss, block)
        self._after_backward(block)

    def _back_propagate(self, loss: Tensor, block: int) -> None:
        loss = self.scale_loss(loss)
        reducer = self._reducer(block)
        with torch.autocast(loss.device.type, enabled=False):
            loss = self._scale(loss)
            (loss if reducer is None else reducer.prepare(loss)).backward()

    def _propagate(self, x: Tensor, grad: Tensor, retain_graph: bool) -> None:
        """Back-propagate the gradient of a block's output, which is scaled already."""
        with torch.autocast(x.device.type, enabled=False):
            x.backward(grad, retain_graph=retain_graph)

    def _after_backward(self, block: int) -> None:
        reducer = self._reducer(block)
        if self.update == 'immediate' and self.should_sync():
            ready, self._pending_block = (block, None) if reducer is None else (self._pending_block, block)
            if ready is not None:
                self._step_block(ready)

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Back-propagate the task loss, then log the iteration's local losses, with one device-to-host transfer."""
        self._scale(loss).backward(**kwargs)
        if self._windows is not None:
            self._windows.end_windows()
        self._end_iteration()

    def finish_iteration(self, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """End an iteration without a task loss: does what :meth:`update_params` does after the task loss's backward pass.

        Counts the iteration and logs its local losses. If the iteration completes an accumulation, clips the gradients, steps
        the optimizer and zeroes the gradients.

        Args:
            step_kwargs: Arguments of the optimizer's ``step``.
            zero_kwargs: Arguments of the optimizer's ``zero_grad``.
        """
        self._end_iteration()
        if self.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def step(self, **kwargs) -> None:
        """Clip and step. Under a loss scaler, unscale the gradients first and skip the step if one isn't finite."""
        if self.loss_scaler is None:
            super().step(**kwargs)
            return
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._fixed_scale)

    def state_dict(self) -> dict:
        state = super().state_dict()
        state['steps'] = self.steps
        if self.loss_scaler is not None:
            state['loss_scaler'] = self.loss_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.steps = state_dict.pop('steps', 0)
        scaler = state_dict.pop('loss_scaler', None)
        if self.loss_scaler is not None and scaler is not None:
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scaler is None else self.loss_scaler.scale(loss)

    def _count_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # The scaler always calls a fused optimizer, which itself skips the step if the scaler has set found_inf.
        skipped = getattr(optimizer, 'found_inf', None)
        if skipped is None or not skipped.item():
            self.steps += 1

    def _end_iteration(self) -> None:
        self._inner_count += 1
        if self._ddp is not None:
            self._ddp.wait()
        local_log, self._local_log = self._local_log, {}
        self._loss_log.report(local_log, self.message_hub)
        if self._pending_block is not None:
            self._step_block(self._pending_block)
            self._pending_block = None

    def _reducer(self, block: int) -> BlockReducer | None:
        return None if self._ddp is None else self._ddp.block_reducers.get(block)

    def _step_block(self, block: int) -> None:
        """Clip the gradients of one block, step its parameters only, and free its gradients."""
        reducer = self._reducer(block)
        if reducer is not None:
            reducer.wait()
        steps = self.steps
        with self._blocks.restrict(block):
            self.step()
            self.zero_grad()
        self.steps = steps  # an iteration counts one step: the one after the task loss

    def _chunked_loss(self, model: nn.Module) -> ChunkedLoss | None:
        if self.images_per_chunk is None:
            return None
        if reason := why_not_dense(model):
            print_log(
                f'images_per_chunk={self.images_per_chunk}: losses are normalised chunk by chunk and averaged, as if the '
                f'images were spread over more GPUs: {reason}',
                logger='current',
            )
        return chunked_loss(model, self.images_per_chunk, self._scale)

    def _step_graphs(self, model: nn.Module) -> StepGraphs:
        device = next(model.parameters()).device.type
        if is_model_wrapper(model) or device != 'cuda':
            reason = f'the model is in {type(model).__name__}' if is_model_wrapper(model) else f'the model is on the {device}'
            raise ConfigError(
                f'cuda_graphs=True requires one process with one GPU, but {reason}: set optim_wrapper.cuda_graphs=False'
            )
        blocks = self._backbone.local
        return StepGraphs(model, self.images_per_chunk, blocks, self._back_propagate, self._after_backward, CUDAGraphCapturer())

    def _clip_grad(self) -> None:
        by_block = self.clip_scope == 'block' and self.grad_name == 'grad_norm' and self._blocks is not None
        scopes: dict[str, list[nn.Parameter]] = {}
        for parameter in (p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None):
            block = self._blocks.block_of.get(parameter) if by_block else None
            scopes.setdefault('' if block is None else f'local/{block}/', []).append(parameter)
        for prefix, scope in scopes.items():
            norm = self.clip_func(scope, **self.clip_grad_kwargs)
            if norm is not None:
                self.message_hub.update_scalar(f'train/{prefix}{self.grad_name}', float(norm))
