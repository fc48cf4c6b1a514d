"""Bytes of a run on a larger batch, from two small ones, against that run."""

import pytest
import torch

from mmman.analysis.memory import LiveBytes
from mmman.analysis.roofline import Device
from mmman.analysis.trace import Extrapolation, Trace


def work(pixels: int, weight: torch.Tensor, objects: int) -> torch.Tensor:
    """Its peak is in the gradient of the weight for few pixels, in the two maps for many; it loops over objects."""
    map_ = torch.zeros(pixels)
    for _ in range(objects):
        torch.eye(1)
    both = map_.sin() + map_.cos()
    gradient = weight * 2 + weight.exp()
    return both.sum() + gradient.sum()


def traced(pixels: int, weight: torch.Tensor, objects: int) -> Trace:
    with Trace(weight) as trace:
        torch.ones(10)
        trace.begin()
        work(pixels, weight, objects)
        trace.mark('end')
    return trace


def test_peak_moves_to_another_moment_than_in_the_small_runs():
    weight = torch.zeros(5000)
    for objects in ((3, 3), (3, 5), (5, 3)):
        pixels = (100, 200, 10000)
        scaled = Extrapolation(traced(100, weight, objects[0]), traced(200, weight, objects[1]), pixels)
        with LiveBytes(weight) as live:
            work(10000, weight, objects[1])
        assert scaled.peak('start', 'end') == live.peak - weight.nbytes
        assert scaled.alive('start') == scaled.alive('end') == 0


def test_what_was_there_before_counts_when_it_is_released():
    with Trace() as first:
        early = torch.zeros(10)
        first.begin()
        del early
        first.mark('released')
    assert Extrapolation(first, first, (1, 2, 3)).alive('released') == -40


def test_the_time_on_a_device_is_that_of_the_run_itself():
    weight, device = torch.zeros(5000), Device('gpu', tf32=1e9, single=1e9, half=1e9, bandwidth=1e9, launch=1e-5, least=1e-6)
    pixels = (2000, 4000, 10000)
    scaled = Extrapolation(traced(2000, weight, 3), traced(4000, weight, 3), pixels, device)
    kernels = [kernel for _, kernel in traced(10000, weight, 3).kernels]
    seconds = [max(device.launch, device.seconds(kernel)) for kernel in kernels]
    assert min(seconds) == device.launch < max(seconds)
    assert scaled.nanoseconds('start') == 0
    assert scaled.nanoseconds('end') == pytest.approx(1e9 * sum(seconds), abs=1)
    assert Extrapolation(traced(2000, weight, 3), traced(4000, weight, 3), pixels).nanoseconds('end') == 0


def test_flops_of_every_kernel_are_those_of_the_run_itself():
    """Work on found objects, fewer of them in the larger run, doesn't spoil the slope of the rest."""

    def run(pixels: int, objects: int) -> Trace:
        with Trace() as trace:
            torch.ones(pixels, 8) @ torch.ones(8, 16)
            torch.ones(objects, 400) @ torch.ones(400, 400)
            trace.mark('end')
        return trace

    scaled = Extrapolation(run(100, 30), run(200, 20), (100, 200, 10000))
    assert scaled.flops('end') == 2 * (10000 * 8 * 16 + 20 * 400 * 400)
