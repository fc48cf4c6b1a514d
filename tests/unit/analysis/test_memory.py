import torch
from mmengine.structures import InstanceData
from torch import nn

from mmman.analysis import LiveBytes, LiveParts


def test_a_training_step_counts_what_arithmetic_says():
    layers, batch, width = 5, 64, 32
    net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)))
    x = torch.randn(batch, width)
    activation, weight, scalar = 4 * batch * width, 4 * width * width, 4
    # Each tanh keeps its output. The first linear layer to run backward, the last, adds the gradient of its output and of its
    # input, and of its weight; the output of its own tanh is gone by then. The loss and its gradient are scalars.
    saved = (layers - 1) * activation
    expected = layers * weight + activation + saved + 2 * activation + weight + 2 * scalar
    with LiveBytes(net, x) as live:
        net(x).sum().backward()
    assert live.peak == expected


def test_held_tensors_count_once_and_views_nothing():
    x = torch.zeros(10, dtype=torch.float64)
    with LiveBytes(x, {'same': [x[2:]]}) as live:
        assert live.current == 80
        y = x.view(2, 5)[0] + 1
        assert live.current == 80 + 40
        del y
        assert live.current == 80
    assert live.peak == 120


def test_optimizer_state_and_gradients_count():
    net = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert LiveBytes(net, optimizer).current == 4 * 64 + 4  # weight, gradient, two moments, step count


def test_operators_count_and_views_do_not():
    x = torch.ones(2, 3, requires_grad=True)
    with LiveBytes(x) as live:
        loss = (x.view(6) * 2).sum()
        assert live.operators == 2
        loss.backward()  # ones like the loss, expanded, and the product with 2
    assert live.operators == 4


def test_repeatable():
    net = nn.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 16, 16)
    peaks = set()
    for _ in range(3):
        net.zero_grad()
        with LiveBytes(net, x) as live:
            net(x).square().mean().backward()
        peaks.add(live.peak)
    assert len(peaks) == 1


def test_parts_are_told_apart():
    weight = torch.zeros(10)
    with LiveParts({'weights': weight, 'again': [weight[2:]]}, part='first') as live:
        x = weight + 1
        live.part = 'second'
        y = x + x
        live.claim(x, 'claimed')
        del y
        live.part = 'first'
        z = x + 1  # as many bytes as before: the peak was reached already
    assert live.parts == {'weights': 40, 'first': 40, 'second': 0, 'claimed': 40}
    assert live.peak_parts == {'weights': 40, 'first': 40, 'second': 40}
    assert sum(live.parts.values()) == live.current == live.peak == 120
    assert live.curves()['second'].tolist() == [0, 0, 40, 40, 40, 0, 0]
    assert sum(live.curves(points=2).values()).max() == 120
    del z


def test_data_samples_count():
    assert LiveBytes([InstanceData(bboxes=torch.zeros(2, 4), labels=torch.zeros(2, dtype=torch.int64))]).current == 48
