"""The event simulation against closed forms."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from mmman import LocalLearningError
from mmman.experimental.scaling import (
    BlockCost,
    Link,
    Network,
    StageProfile,
    simulate_end_to_end,
    simulate_local,
    simulate_pipeline,
)
from mmman.experimental.scaling.simulate import BUCKET, FIRST_BUCKET, Produced, buckets

FREE = Network()
MB = 1e6


def stages(*seconds, **sizes):
    """Blocks that compute so long in all, a quarter of it backward; their update costs nothing."""
    return tuple(BlockCost(t / 2, t / 4, t / 4, **sizes) for t in seconds)


def profile(*blocks, **options):
    return StageProfile(batch=16, blocks=blocks, end_to_end=stages(1.0), **options)


def slow(bandwidth=float('inf'), latency=0.0, machine=8):
    return Network(Link(bandwidth, latency), Link(bandwidth, latency), machine)


@pytest.mark.parametrize('count, iterations', [(2, 1), (4, 10), (4, 1000), (8, 50)])
def test_a_balanced_pipeline_has_the_textbook_bubble(count, iterations):
    outcome = simulate_pipeline(profile(*stages(*[0.25] * count)), count, FREE, iterations=iterations)
    steps = iterations + count - 1
    assert outcome.iteration == pytest.approx(0.25 * steps / iterations, rel=1e-12)
    assert outcome.bubble == pytest.approx((count - 1) / steps, rel=1e-9)
    assert outcome.images_per_second == pytest.approx(16 / outcome.iteration)


def test_an_unbalanced_pipeline_is_as_fast_as_its_slowest_stage():
    times = [0.1, 0.4, 0.2]
    outcome = simulate_pipeline(profile(*stages(*times)), 3, FREE, staleness=2, iterations=100)
    assert outcome.iteration * 100 == pytest.approx(sum(times) + 99 * 0.4)
    assert outcome.bubble == pytest.approx(1 - 100 * sum(times) / (3 * (sum(times) + 99 * 0.4)))


def test_without_staleness_neighbours_alternate():
    times, iterations = [0.1, 0.4, 0.3], 50
    outcome = simulate_pipeline(profile(*stages(*times)), 3, FREE, staleness=0, iterations=iterations)
    # Stages 2 and 3 take turns, and 1 fits in: 0.1 until the first turn.
    assert outcome.iteration * iterations == pytest.approx(0.1 + iterations * (0.4 + 0.3))


def test_features_leave_before_the_update_and_parameters_after_it():
    block = BlockCost(0.1, 0.1, 0.2, update=0.3)
    once = simulate_pipeline(profile(block, block), 2, FREE, iterations=1)
    assert once.iteration == pytest.approx(0.4 + 0.7)
    # Without staleness stage 1 computes for 0.4, then stage 2 for 0.7; stage 1 updates beside that.
    alternating = simulate_pipeline(profile(block, block), 2, FREE, staleness=0, iterations=100)
    assert alternating.iteration == pytest.approx(1.1)


def test_staleness_pays_for_the_round_trip():
    """S + 1 batches travel to the next stage and their credits back: the pair's period is the round trip over S + 1."""
    blocks = stages(1.0, 1.0, first_unit=0.25, features=0.5)
    for staleness, period in [(0, 2.75), (1, 1.375), (2, 1.0)]:
        two, one = (simulate_pipeline(profile(*blocks), 2, slow(1.0), staleness, n) for n in (240, 120))
        assert (two.iteration * 240 - one.iteration * 120) / 120 == pytest.approx(period, rel=1e-9)


@pytest.mark.parametrize('seed', range(20))
def test_the_period_is_the_heaviest_cycle(seed):
    """The steady state of a max-plus recurrence: its largest cycle mean, over stages, links, and pairs of neighbours."""
    rng = random.Random(seed)
    times = [rng.uniform(0.1, 1) for _ in range(rng.randint(2, 6))]
    sizes = {name: rng.uniform(0, 0.5) for name in ('features', 'first_unit')}
    latency, staleness = rng.uniform(0, 0.5), rng.randint(0, 3)
    given = profile(*stages(*times, **sizes))
    pairs = [(a + b + sizes['features'] + sizes['first_unit'] + 2 * latency) / (1 + staleness) for a, b in pairwise(times)]
    period = max(*times, *sizes.values(), *pairs)
    n = 12 * (1 + staleness)
    far, near = (simulate_pipeline(given, len(times), slow(1.0, latency), staleness, m) for m in (80 * n, 40 * n))
    assert (far.iteration * 80 * n - near.iteration * 40 * n) / (40 * n) == pytest.approx(period, rel=1e-6)


def test_a_thin_link_sets_the_pace_and_relays_what_the_neck_takes():
    blocks = [
        BlockCost(0.01, features=4 * MB, taps=4 * MB),
        BlockCost(0.01, features=2 * MB, taps=2 * MB),
        BlockCost(0.01, needs_images=True),
    ]
    given = profile(*blocks, images=3 * MB, labels=1 * MB)
    assert [given.message(j) for j in range(2)] == [8 * MB, 10 * MB]  # own + labels + images; and block 1's tap
    outcome = simulate_pipeline(given, 3, slow(100 * MB), staleness=20, iterations=2000)
    assert outcome.iteration == pytest.approx(0.1, rel=0.01)
    assert outcome.link == pytest.approx(1, rel=0.01)
    last_needs_none = profile(*blocks[:2], replace(blocks[2], needs_images=False), images=3 * MB)
    assert last_needs_none.message(0) == 4 * MB


def test_loading_sets_the_pace_where_it_is_slower():
    given = profile(*stages(0.1, 0.1), loading=0.3)
    assert simulate_pipeline(given, 2, FREE, iterations=100).iteration * 100 == pytest.approx(100 * 0.3 + 0.2)
    assert simulate_local(given, 2, FREE, blockwise=True).iteration == pytest.approx(0.3)


def test_replicas_double_the_images_and_wait_for_their_gradients():
    size = 8 * MB
    blocks = stages(0.25, 0.25, gradients=size)
    free = simulate_pipeline(profile(*blocks), 8, FREE, iterations=100)
    one = simulate_pipeline(profile(*blocks), 2, FREE, iterations=100)
    assert free.images_per_second == pytest.approx(4 * one.images_per_second)
    # A backward pass of 1/16 s; the ring of 4 needs 2 * 3/4 * 8 MB. The last bucket is full when the backward pass ends.
    last = size - FIRST_BUCKET
    for bandwidth in (1e9, 1e6):
        first_ready, end = 0.0625 * FIRST_BUCKET / size, 0.0625
        ring = [1.5 * part / bandwidth for part in (FIRST_BUCKET, last)]
        exposed = max(first_ready + ring[0], end) + ring[1] - end
        outcome = simulate_pipeline(profile(*blocks), 8, slow(bandwidth), iterations=100)
        assert outcome.iteration * 100 == pytest.approx(0.25 + 100 * (0.25 + exposed))


def test_a_replica_across_machines_holds_up_the_others():
    """Three GPUs a machine: of two replicas of two stages the second spans both."""
    blocks = stages(0.1, 0.1, features=1 * MB)
    near = simulate_pipeline(profile(*blocks), 4, Network(Link(), Link(1 * MB), machine=4), iterations=200)
    far = simulate_pipeline(profile(*blocks), 4, Network(Link(), Link(1 * MB), machine=3), iterations=200)
    assert near.iteration == pytest.approx(0.1, rel=0.01)
    assert far.images_per_second < near.images_per_second / 5


def test_a_reduction_waits_for_its_slowest_replica():
    """Of two replicas of two stages the second spans two machines, a second apart; so does the ring of both last stages."""
    network = Network(Link(), Link(latency=1.0), machine=3)
    blocks = [*stages(0.1), *stages(0.1, gradients=4)]
    outcome = simulate_pipeline(profile(*blocks), 4, network, iterations=1)
    assert outcome.iteration == pytest.approx(0.1 + 1.0 + 0.1 + 2 * 1.0)


def test_ring_all_reduce():
    link = Link(1e9, 1e-5)
    assert link.all_reduce(1e9, 4) == pytest.approx(2 * 3 / 4 + 6e-5)
    assert link.all_reduce(1e9, 1) == 0
    network = Network(Link(1e9), Link(1e8, 1e-3), machine=8)
    assert network.ring(range(8)) == Link(1e9)
    assert network.ring(range(9)) == Link(1e8, 1e-3)
    assert network.link(7, 8) == network.inter and network.link(8, 15) == network.intra


def test_buckets_are_torchs():
    ready = buckets([Produced(1, 2, FIRST_BUCKET), Produced(2, 4, 2 * BUCKET), Produced(4, 4, 5)])
    assert ready == [(2, FIRST_BUCKET), (3, BUCKET), (4, BUCKET), (4, 5)]
    assert buckets([Produced(0, 1, 0)]) == []


def test_end_to_end_hides_what_fits_into_the_backward_pass():
    block = BlockCost(0.1, 0.05, 0.2, 0.01, gradients=FIRST_BUCKET + BUCKET)
    given = StageProfile(8, stages(0.1), (block,))
    free = simulate_end_to_end(given, 4, FREE)
    assert free.iteration == pytest.approx(0.36) and free.bubble == pytest.approx(0)
    assert free.images_per_second == pytest.approx(4 * 8 / 0.36)
    bandwidth = 1.5 * BUCKET / 0.3  # the second bucket is full at the end of the backward pass and takes 0.3 s
    outcome = simulate_end_to_end(given, 4, slow(bandwidth))
    assert outcome.iteration == pytest.approx(0.66)
    assert outcome.bubble == pytest.approx(0.3 / 0.66)
    assert outcome.link == pytest.approx((0.3 + 0.3 / 25) / 0.66)
    assert simulate_end_to_end(given, 1, slow(bandwidth)).iteration == pytest.approx(0.36)


def test_blockwise_reduction_runs_beside_the_next_block_and_stock_reduction_does_not():
    size, bandwidth = FIRST_BUCKET / 2, FIRST_BUCKET / 2 / 0.2  # a ring of two: 0.2 s a block
    blocks = [BlockCost(0.1, 0.1, 0.1, gradients=size), BlockCost(0.1, 0.1, 0.1, head_gradients=size)]
    given, network = profile(*blocks), slow(bandwidth)
    # Block 1's reduction, 0.3 to 0.5, is over before block 2's begins at 0.6.
    assert simulate_local(given, 2, network, blockwise=True).iteration == pytest.approx(0.8)
    # The stock reducer begins with the last block's, at 0.6.
    assert simulate_local(given, 2, network, blockwise=False).iteration == pytest.approx(1.0)
    assert simulate_local(given, 1, network, blockwise=False).iteration == pytest.approx(0.6)


@pytest.mark.parametrize(
    'mistake, says',
    [
        (lambda: simulate_pipeline(profile(*stages(1, 1)), 3, FREE), 'a multiple of 2'),
        (lambda: simulate_pipeline(profile(*stages(1, 1)), 2, FREE, staleness=-1), 'staleness=-1'),
        (lambda: simulate_local(profile(*stages(1)), 0, FREE, True), 'at least 1'),
    ],
)
def test_mistakes_say_what_to_change(mistake, says):
    with pytest.raises(LocalLearningError, match=says) as caught:
        mistake()
    assert '\n' not in str(caught.value)
