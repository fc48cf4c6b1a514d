"""Data parallel training of blocks: a block's gradients are reduced while the next block computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mmman.errors import MisuseError
from mmman.local.scopes import trained_parameters
from mmman.memory.chunks import replaced
from mmman.options import check_options, checked
from mmman.registry import MODEL_WRAPPERS

REFUSED = {
    'static_graph': 'every block has a backward pass of its own, which a static graph does not reduce',
    'mixed_precision': "set optim_wrapper.dtype='bfloat16' or 'float16' instead",
    'delay_all_reduce_named_params': 'leave it out',
}
IGNORED = '_ddp_params_and_buffers_to_ignore'  # where DDP looks, on the module
SHARED = ('process_group', 'device_mesh', 'bucket_cap_mb', 'find_unused_parameters')


class BlockReducer:
    """Averages the gradients of one block over processes, without waiting for the result where its backward pass ends.

    Torch's DDP reducer does the work, on a module that holds the block's parameters and computes nothing: its hooks sit where
    gradients accumulate, so it needn't have run the forward pass. Gradients are views of its buckets.

    Example:
        >>> reducer.prepare(loss).backward()  # launches the reduction, bucket by bucket
        >>> ...  # the next block computes
        >>> reducer.wait()  # every gradient is the mean over processes

    Args:
        parameters: The block's trainable parameters, or pairs of a name and a parameter; names serve error messages. They are
            set to those of the group's first process.
        process_group: The processes that share the block; None is all of them.
        **options: More of :class:`torch.nn.parallel.DistributedDataParallel`'s, e.g. ``bucket_cap_mb``,
            ``find_unused_parameters``.

    Attributes:
        on_wait: Called where :meth:`wait` begins.
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
        """Expect the backward pass of ``loss``.

        Args:
            loss: The block's loss, a scalar, with the block's graph behind it.

        Returns:
            The loss to call ``backward`` of.

        Raises:
            RuntimeError: The pass before left gradients unreduced; :meth:`wait` says which.
        """
        return self._ddp(loss)

    def wait(self) -> None:
        """Finish the reduction: on a GPU, the current stream waits for it and the host doesn't.

        Raises:
            MisuseError: Parameters got no gradient, so that their bucket was never reduced.
        """
        if self.on_wait is not None:
            self.on_wait()
        check_reduced(self._ddp, self._parameters)
        self._buckets.wait()

    def no_sync(self) -> AbstractContextManager[None]:
        """Context of an accumulation: backward passes prepared in it keep their gradients to themselves."""
        return self._ddp.no_sync()

    def register_comm_hook(self, state: object, hook: Callable[[object, dist.GradBucket], Future]) -> None:
        """Reduce by a communication hook of DDP's.

        Args:
            state: What the hook gets as first argument.
            hook: Launches the reduction of a bucket; its future holds the reduced bucket.
        """
        self._buckets.state, self._buckets.hook = state, hook


@MODEL_WRAPPERS.register_module()
@checked('model_wrapper_cfg', given=('module',))
class LocalDistributedDataParallel(MMDistributedDataParallel):
    """Distributed data parallel training of a localised model; on one block it is ``MMDistributedDataParallel``.

    Each of the first K-1 blocks with its local head has a :class:`BlockReducer`, which :class:`LocalLearningOptimWrapper`
    prepares before the block's backward pass and waits for before it clips and steps. The rest (last block, neck, head) and all
    buffers and frozen parameters are this wrapper's own.

    Args:
        module: The model, localised.
        detect_anomalous_params: See :class:`mmengine.model.MMDistributedDataParallel`.
        gradient_as_bucket_view: For the parameters that the task loss trains; gradients of the other blocks always are views.
        **kwargs: Those of :class:`torch.nn.parallel.DistributedDataParallel`. ``process_group``, ``device_mesh``,
            ``bucket_cap_mb`` and ``find_unused_parameters`` hold for every block. ``device_ids`` are ignored on a CPU.

    Attributes:
        block_reducers: The reducers of blocks 1 to K-1, by the block's number.

    Raises:
        MisuseError: An option that has no meaning here; a parameter that two blocks share.
    """

    def __init__(
        self, module: nn.Module, detect_anomalous_params: bool = False, gradient_as_bucket_view: bool = True, **kwargs
    ) -> None:
        for option, instead in REFUSED.items():
            if kwargs.get(option):
                raise MisuseError(f'LocalDistributedDataParallel does not take {option}: {instead}')
        check_options(DistributedDataParallel, kwargs, 'model_wrapper_cfg', given=('module',))
        if next(module.parameters()).device.type == 'cpu':
            kwargs.update(device_ids=None, output_device=None)
        *blocks, own = trained_parameters(module)
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
        """Finish the reduction of every block.

        Raises:
            MisuseError: Parameters got no gradient, so that their bucket was never reduced.
        """
        for reducer in self.block_reducers.values():
            reducer.wait()
        check_reduced(self, self._own_parameters)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of an accumulation: forward and backward passes in it keep their gradients to themselves."""
        with ExitStack() as stack:
            stack.enter_context(super().no_sync())
            for reducer in self.block_reducers.values():
                stack.enter_context(reducer.no_sync())
            yield

    def register_comm_hook(self, state: object, hook: Callable[[object, dist.GradBucket], Future]) -> None:
        """Reduce all gradients by a communication hook of DDP's.

        Args:
            state: What the hook gets as first argument: None, a process group, or, as a state may keep something for every
                bucket (PowerSGD does) and buckets are counted in each block, a function without arguments that makes a new one.
            hook: Launches the reduction of a bucket; its future holds the reduced bucket.

        Raises:
            MisuseError: A state that all blocks would share.
        """
        if state is not None and not isinstance(state, dist.ProcessGroup) and not callable(state):
            raise MisuseError(
                f'all blocks would share one {type(state).__name__}, which counts buckets from 0 in each of them: '
                f'give a function that makes one, e.g. register_comm_hook(lambda: {type(state).__name__}(...), hook)'
            )
        make = state if callable(state) else lambda: state
        super().register_comm_hook(make(), hook)
        for reducer in self.block_reducers.values():
            reducer.register_comm_hook(make(), hook)


def check_reduced(ddp: DistributedDataParallel, parameters: dict[str, nn.Parameter]) -> None:
    """Raise :class:`MisuseError` where a backward pass didn't reach all of ``parameters``, which ``ddp`` reduces."""
    try:
        ddp._check_reducer_finalized()
    except RuntimeError as error:
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise MisuseError(
            f'{missing[0] if missing else "a parameter"}{more} got no gradient, so that processes cannot average it: use it in '
            'the loss, freeze it (requires_grad=False), or set find_unused_parameters=True in model_wrapper_cfg'
        ) from error


class _Carrier(nn.Module):
    """Holds the parameters of a reducer; what goes in comes out."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_block = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class _Buckets:
    """The buckets of a reducer whose reduction was launched and not waited for.

    Args:
        process_group: The processes to take the mean over.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.hook: Callable[[object, dist.GradBucket], Future] | None = None
        self.state: object = None
        self.launched: list[tuple[Tensor, dist.Work | Future]] = []

    def launch(self, bucket: dist.GradBucket) -> Tensor:
        """Launch the reduction of a bucket; return the buffer that will hold the result once it was waited for."""
        buffer = bucket.buffer()
        if self.hook is not None:
            self.launched.append((buffer, self.hook(self.state, bucket)))
        else:  # without callbacks in Python, which gloo's threads would have to take the interpreter for
            buffer.div_(self.process_group.size())
            self.launched.append((buffer, dist.all_reduce(buffer, group=self.process_group, async_op=True)))
        return buffer

    def wait(self) -> None:
        for buffer, reduction in self.launched:
            result = reduction.wait()
            if isinstance(result, Tensor) and result.data_ptr() != buffer.data_ptr():
                buffer.copy_(result.view_as(buffer))
        self.launched.clear()


def _launch(buckets: _Buckets, bucket: dist.GradBucket) -> Future[Tensor]:
    """Communication hook that launches the reduction and calls it done, so that DDP doesn't wait where the backward ends.

    DDP then takes the bucket for the result. It neither reads nor copies it, because gradients are views of it.
    """
    buffer = buckets.launch(bucket)
    done = Future(devices=None if buffer.device.type == 'cpu' else [buffer.device])
    done.set_result(buffer)
    return done


@contextmanager
def _hidden_from_ddp(module: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """DDP of ``module`` that is made in this context leaves ``parameters`` alone, beside what it was told before."""
    before = getattr(module, IGNORED, [])
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter in parameters]
    with replaced(module, IGNORED, [*before, *names]):
        yield
