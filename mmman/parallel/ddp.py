"""Data parallel training of blocks. The gradient reduction of a block overlaps with the computation of the next block."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mmman.engine.block_parameters import parameters_by_block
from mmman.errors import ConfigError
from mmman.memory.chunks import replaced
from mmman.options import check_options, checked
from mmman.registry import MODEL_WRAPPERS

REFUSED = {
    'static_graph': 'every block has its own backward pass, which a static graph does not reduce',
    'mixed_precision': "set optim_wrapper.dtype='bfloat16' or 'float16' instead",
    'delay_all_reduce_named_params': 'remove it',
}
IGNORED = '_ddp_params_and_buffers_to_ignore'  # module attribute in which DDP looks for names to ignore
SHARED = ('process_group', 'device_mesh', 'bucket_cap_mb', 'find_unused_parameters')


class BlockReducer:
    """Averages the gradients of one block over processes. The end of the block's backward pass does not wait for the result.

    It uses DDP's reducer on a module that holds the block's parameters and computes nothing. The reducer's hooks are on the
    gradient accumulators, so that it need not have run the block's forward pass. Gradients are views of the reducer's buckets.

    Example:
        >>> reducer.prepare(loss).backward()  # launches the reduction, bucket by bucket
        >>> ...  # the next block computes
        >>> reducer.wait()  # every gradient is the mean over processes

    Args:
        parameters: The block's trainable parameters, or pairs of a name and a parameter. Names are used in error messages. The
            parameters are broadcast from the first process of the group.
        process_group: The processes that share the block. None means all processes.
        **options: Further options of :class:`torch.nn.parallel.DistributedDataParallel`, e.g. ``bucket_cap_mb``,
            ``find_unused_parameters``.

    Attributes:
        on_wait: Callback at the start of :meth:`wait`. None by default.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        process_group: dist.ProcessGroup | None = None,
        **options,
    ) -> None:
        self.on_wait: Callable[[], None] | None = None
        named = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(parameters)]
        self._parameters = dict(named)
        self._ddp = DistributedDataParallel(
            _Carrier(self._parameters.values()),
            process_group=process_group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            **options,
        )
        self._buckets = _Buckets(self._ddp.process_group)
        self._ddp.register_comm_hook(self._buckets, _launch)

    def prepare(self, loss: Tensor) -> Tensor:
        """Prepare the reduction for the backward pass of ``loss``.

        Args:
            loss: The block's loss, a scalar that is attached to the block's autograd graph.

        Returns:
            The loss to call ``backward`` on.

        Raises:
            RuntimeError: The previous backward pass left gradients unreduced. :meth:`wait` names their parameters.
        """
        return self._ddp(loss)

    def wait(self) -> None:
        """Wait for the reduction to finish. On a GPU the current stream waits for it, and the host does not.

        Raises:
            ConfigError: Parameters received no gradient, so that their bucket was not reduced.
        """
        if self.on_wait is not None:
            self.on_wait()
        check_reduced(self._ddp, self._parameters)
        self._buckets.wait()

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for gradient accumulation. Backward passes that are prepared in it are not reduced."""
        return self._ddp.no_sync()

    def register_comm_hook(self, state: object, hook: Callable[[object, dist.GradBucket], Future]) -> None:
        """Reduce gradients with a DDP communication hook.

        Args:
            state: First argument of the hook.
            hook: Launches the reduction of a bucket. Returns a future of the reduced bucket.
        """
        self._buckets.state, self._buckets.hook = state, hook


@MODEL_WRAPPERS.register_module()
@checked('model_wrapper_cfg', injected=('module',))
class LocalDistributedDataParallel(MMDistributedDataParallel):
    """Distributed data parallel training of a localised model. With one block it is ``MMDistributedDataParallel``.

    Each of the first K-1 blocks, with its local head, has a :class:`BlockReducer`. :class:`LocalLearningOptimWrapper` prepares
    the reducer before the block's backward pass and waits for it before it clips gradients and steps. This wrapper itself
    handles the last block, neck and head, and all buffers and frozen parameters.

    Args:
        module: The localised model.
        detect_anomalous_params: See :class:`mmengine.model.MMDistributedDataParallel`.
        gradient_as_bucket_view: Applies to the parameters that the task loss trains. Gradients of the other blocks are always
            views.
        **kwargs: Arguments of :class:`torch.nn.parallel.DistributedDataParallel`. ``process_group``, ``device_mesh``,
            ``bucket_cap_mb`` and ``find_unused_parameters`` apply to every block. ``device_ids`` is ignored on a CPU.

    Attributes:
        block_reducers: The reducers of blocks 1 to K-1, by the block's number.

    Raises:
        ConfigError: An option is not supported, or two blocks share a parameter.
    """

    def __init__(
        self, module: nn.Module, detect_anomalous_params: bool = False, gradient_as_bucket_view: bool = True, **kwargs
    ) -> None:
        for option, instead in REFUSED.items():
            if kwargs.get(option):
                raise ConfigError(f'LocalDistributedDataParallel does not take {option}: {instead}')
        check_options(DistributedDataParallel, kwargs, 'model_wrapper_cfg', injected=('module',))
        if next(module.parameters()).device.type == 'cpu':
            kwargs.update(device_ids=None, output_device=None)
        *blocks, own = parameters_by_block(module)
        with _hidden_from_ddp(module, {parameter for block in blocks for parameter in block.values()}):
            super().__init__(
                module,
                detect_anomalous_params=detect_anomalous_params,
                gradient_as_bucket_view=gradient_as_bucket_view,
                **kwargs,
            )
        options = {name: kwargs[name] for name in SHARED if name in kwargs}
        self.block_reducers = {j: BlockReducer(block.items(), **options) for j, block in enumerate(blocks, start=1)}
        self._own_parameters = own

    def wait(self) -> None:
        """Wait for the reductions of all blocks to finish.

        Raises:
            ConfigError: Parameters received no gradient, so that their bucket was not reduced.
        """
        for reducer in self.block_reducers.values():
            reducer.wait()
        check_reduced(self, self._own_parameters)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context for gradient accumulation. The gradients of forward and backward passes in it are not reduced."""
        with ExitStack() as stack:
            stack.enter_context(super().no_sync())
            for reducer in self.block_reducers.values():
                stack.enter_context(reducer.no_sync())
            yield

    def register_comm_hook(self, state: object, hook: Callable[[object, dist.GradBucket], Future]) -> None:
        """Reduce the gradients of all blocks with a DDP communication hook.

        Args:
            state: First argument of the hook: None, a process group, or a function without arguments that returns a new state.
                Each block needs its own state, because a state may store values per bucket index (as PowerSGD does) and each
                block counts its buckets from 0.
            hook: Launches the reduction of a bucket. Returns a future of the reduced bucket.

        Raises:
            ConfigError: All blocks would share the state.
        """
        if state is not None and not isinstance(state, dist.ProcessGroup) and not callable(state):
            raise ConfigError(
                f'all blocks would share one {type(state).__name__}, which counts buckets from 0 in each of them: '
                f'pass a function that makes one, e.g. register_comm_hook(lambda: {type(state).__name__}(...), hook)'
            )
        make = state if callable(state) else lambda: state
        super().register_comm_hook(make(), hook)
        for reducer in self.block_reducers.values():
            reducer.register_comm_hook(make(), hook)


def check_reduced(ddp: DistributedDataParallel, parameters: dict[str, nn.Parameter]) -> None:
    """Check that the backward pass reached all parameters of a reducer.

    Args:
        ddp: The DDP module that reduces the parameters.
        parameters: The parameters by name.

    Raises:
        ConfigError: A parameter received no gradient.
    """
    try:
        ddp._check_reducer_finalized()
    except RuntimeError as error:
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise ConfigError(
            f'{missing[0] if missing else "a parameter"}{more} got no gradient, so that processes cannot average it: use it in '
            'the loss, freeze it (requires_grad=False), or set find_unused_parameters=True in model_wrapper_cfg'
        ) from error


class _Carrier(nn.Module):
    """Holds the parameters of a reducer. Its forward pass is the identity."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_block = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class _Buckets:
    """The buckets of a reducer whose reduction has been launched but not waited for.

    Args:
        process_group: The processes over which gradients are averaged.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.hook: Callable[[object, dist.GradBucket], Future] | None = None
        self.state: object = None
        self.launched: list[tuple[Tensor, dist.Work | Future]] = []

    def launch(self, bucket: dist.GradBucket) -> Tensor:
        """Launch the reduction of a bucket. Returns the buffer that holds the result after :meth:`wait`."""
        buffer = bucket.buffer()
        if self.hook is not None:
            self.launched.append((buffer, self.hook(self.state, bucket)))
        else:  # without Python callbacks, for which gloo's threads would need the GIL
            buffer.div_(self.process_group.size())
            self.launched.append((buffer, dist.all_reduce(buffer, group=self.process_group, async_op=True)))
        return buffer

    def wait(self) -> None:
        """Wait for all launched reductions, and copy results that are not in their buffer into it."""
        for buffer, reduction in self.launched:
            result = reduction.wait()
            if isinstance(result, Tensor) and result.data_ptr() != buffer.data_ptr():
                buffer.copy_(result.view_as(buffer))
        self.launched.clear()


def _launch(buckets: _Buckets, bucket: dist.GradBucket) -> Future[Tensor]:
    """Communication hook that launches the reduction and returns a completed future, so that DDP does not wait for it.

    DDP takes the bucket as the result. It neither reads nor copies the bucket, because gradients are views of it.
    """
    buffer = buckets.launch(bucket)
    done = Future(devices=None if buffer.device.type == 'cpu' else [buffer.device])
    done.set_result(buffer)
    return done


@contextmanager
def _hidden_from_ddp(module: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Make a DDP wrapper of ``module`` that is created in this context ignore ``parameters`` too, and restore the list."""
    before = getattr(module, IGNORED, [])
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter in parameters]
    with replaced(module, IGNORED, [*before, *names]):
        yield
