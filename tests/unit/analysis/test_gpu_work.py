"""Launches, waits and moved bytes of known operators."""

import torch

from mmman.analysis.gpu_work import GPUWork


def work_of(run, part='rest'):
    with GPUWork(lambda: part) as work:
        run()
    return work.parts.get(part)


def test_launches_and_bytes_of_operators():
    x = torch.ones(4, 8)

    def run():
        y = x.view(8, 4).t()  # views
        torch.empty(3)  # an allocation
        y + 1  # reads 128 bytes, writes 128
        x.sum()  # reads 128, writes 4

    work = work_of(run)
    assert (work.launches, work.moved, work.waits.total()) == (2, 388, 0)


def test_an_optimizer_step_is_one_launch():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer = torch.optim.Adam(parameters, foreach=False)
    work = work_of(optimizer.step, 'optimizer step')
    assert (work.launches, work.waits.total()) == (1, 0)  # the number of steps is on the CPU
    running = []
    with GPUWork(lambda: running[-1]) as work:
        for part in ('optimizer step', 'block 1', 'optimizer step'):  # immediate updates
            running.append(part)
            optimizer.step()
    assert work.parts['optimizer step'].launches == 2


def test_every_wait_is_found_on_its_line():
    x = torch.arange(4.0)
    waiting = [
        lambda: x[0].item(),
        lambda: float(x[1]),
        lambda: bool(x[1] > 0),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.unique(),
        lambda: x.masked_select(x > 1),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.clone().__setitem__(x > 1, x[2:]),
    ]
    for run in waiting:
        waits = work_of(run).waits
        assert waits.total() == 1, run.__code__.co_firstlineno
        assert next(iter(waits)).endswith(f'test_gpu_work.py:{run.__code__.co_firstlineno}')
    for run in (lambda: x[1:], lambda: x[torch.tensor([1, 2])], lambda: x.where(x > 1, 0.0), lambda: x.topk(2)):
        work = work_of(run)
        assert work is None or not work.waits
