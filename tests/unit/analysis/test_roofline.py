"""The roofline model of a GPU, on timelines whose times are known."""

import pytest
import torch

from mmman.analysis.gpu_work import GPUWork, Kernel
from mmman.analysis.roofline import BYTES, DEVICES, PRODUCTS, Device, step_time

RATES = {'tf32': 50 / PRODUCTS, 'single': 5 / PRODUCTS, 'half': 100 / PRODUCTS, 'bandwidth': 25 / BYTES}
GPU = Device('gpu', **RATES, launch=1.0, least=0.1)


@pytest.mark.parametrize(
    ('kernel', 'seconds'),
    [
        (Kernel(flops=100, is_convolution=True), 2.0),
        (Kernel(flops=100), 20.0),
        (Kernel(flops=100, is_half=True), 1.0),
        (Kernel(flops=100, is_convolution=True, is_half=True), 1.0),
        (Kernel(moved=100), 4.0),
        (Kernel(flops=100, moved=100, is_convolution=True), 4.0),
        (Kernel(), 0.1),
        (Kernel(moved=1, flops=1), 0.2),
        (Kernel(moved=1), 0.1),
    ],
)
def test_a_kernel_takes_as_long_as_its_flops_or_its_bytes(kernel, seconds):
    assert GPU.seconds(kernel) == pytest.approx(seconds)


def test_the_slower_clock_decides():
    long, short = Kernel(moved=250), Kernel(moved=5)  # 10 and 0.2 seconds
    assert step_time([short] * 4, GPU).step == pytest.approx(4.2)  # the core launches the last one at 4
    assert step_time([long] * 4, GPU).step == pytest.approx(41.0)  # the GPU starts at 1 and doesn't stop
    assert step_time([long, short, long], GPU).kernels == pytest.approx(20.2)


def test_a_wait_stops_the_core():
    long, short = Kernel(moved=250), Kernel(moved=5)
    without = step_time([long, short, short, short], GPU).step
    assert without == pytest.approx(11.6)
    assert step_time([long, None, short, short, short], GPU).step == pytest.approx(14.2)  # 11, three launches, the last kernel
    assert step_time([long, None], GPU).step == pytest.approx(11.0)
    assert step_time([], GPU).step == 0.0


def test_the_timeline_of_a_few_operators():
    convolution, x = torch.nn.Conv2d(2, 4, 1, bias=False), torch.rand(1, 2, 3, 3)
    with GPUWork(lambda: 'block 1') as work:
        y = convolution(x)
        y.sum().item()
        y.half() @ y.half().mT
    product, *_ = [kernel for kernel in work.timeline if kernel is not None and kernel.flops]
    assert product == Kernel(flops=2 * 2 * 4 * 9, moved=4 * (18 + 8 + 36), is_convolution=True, is_half=False)
    assert work.timeline.count(None) == work.parts['block 1'].waits.total() == 1
    assert len(work.timeline) - 1 == work.parts['block 1'].launches
    assert [kernel.is_half for kernel in work.timeline[-1:]] == [True]


def test_an_optimizer_step_is_one_kernel_that_moves_all_bytes():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    with GPUWork(lambda: 'optimizer step') as work:
        optimizer.step()
    (kernel,) = work.timeline
    assert kernel.moved == work.parts['optimizer step'].moved > 3 * 8


def test_presets_are_called_by_their_names():
    assert all(device.name == name for name, device in DEVICES.items())
