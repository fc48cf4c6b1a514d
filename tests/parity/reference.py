"""MAN++ as the paper states it, in one plain loop. It imports torch alone and shares nothing with mmman.

A network is a list of units. ``cuts`` holds the indices of the units that end the first K-1 blocks, ``taps`` those whose output
the model's neck or head takes. Local head j sits on cut j and sees s_j * E_j(x) + (2 - s_j) * B_j(x). In MLAAN's LAM, E_j and
B_j = A_1 copy a later unit, and A_2 to A_d run behind them; in its windows, a local loss trains several blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass
class Head:
    """A local head: E and B copy ``source``, the first unit of the next block or a later one; delta is s - 1; ``task`` is its
    own network, behind ``later``, A_2 to A_d of LAM."""

    source: nn.Module
    momentum: nn.Module | None
    bias: nn.Module | None
    delta: nn.Parameter | None
    task: nn.Module
    loss: Callable[[Tensor, dict], Tensor]
    later: list[nn.Module] = field(default_factory=list)
    own: nn.Module | None = None
    own_loss: Callable[[Tensor, dict], Tensor] | None = None

    def __call__(self, x: Tensor, batch: dict) -> Tensor:
        y = self.transfer(x)
        for unit in self.later:
            y = unit(y)
        return self.loss(y, batch)

    def transfer(self, x: Tensor) -> Tensor:
        if self.momentum is None:
            return x
        if self.bias is None:
            return self.momentum(x)
        if self.delta is None:
            return self.momentum(x) + self.bias(x)
        s = 1 + self.delta
        return s * self.momentum(x) + (2 - s) * self.bias(x)

    def trained(self) -> list[nn.Parameter]:
        delta = [] if self.delta is None else [self.delta]
        bias = [] if self.bias is None else [*self.bias.parameters()]
        own = [] if self.own is None else [*self.own.parameters()]
        return [*delta, *bias, *self.task.parameters(), *(p for unit in self.later for p in unit.parameters()), *own]


@dataclass
class Reference:
    units: list[nn.Module]
    cuts: list[int]
    taps: list[int]
    heads: list[Head]
    task_modules: list[nn.Module]
    task_loss: Callable[[list[Tensor], dict], Tensor]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    momentum: float = 0.995
    accumulate: int = 1
    max_norm: float | None = None
    window: int = 1
    iteration: int = 0
    groups: list[list[nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        ends = [0, *(cut + 1 for cut in self.cuts), len(self.units)]
        blocks = [[p for unit in self.units[a:b] for p in unit.parameters()] for a, b in pairwise(ends)]
        extra = [*(head.trained() for head in self.heads), [p for m in self.task_modules for p in m.parameters()]]
        self.groups = [block + more for block, more in zip(blocks, extra, strict=True)]
        self.optim = self.optimizer([p for group in self.groups for p in group])

    def step(self, batch: dict) -> list[float]:
        """One iteration on ``batch``; returns the K-1 local losses and the task loss."""
        losses = self.isolated(batch) if self.window == 1 else self.windows(batch)
        self.iteration += 1
        if self.iteration % self.accumulate == 0:
            self.update()
        return losses

    def isolated(self, batch: dict) -> list[float]:
        losses, features, x = [], [], batch['inputs']
        for i, unit in enumerate(self.units):
            x = unit(x)
            if i in self.cuts:
                head = self.heads[self.cuts.index(i)]
                loss = head(x, batch)
                (loss / self.accumulate).backward()
                losses.append(loss.item())
                x = x.detach()
            if i in self.taps:
                features.append(x if i > max(self.cuts, default=-1) else x.detach())
        loss = self.task_loss(features, batch)
        (loss / self.accumulate).backward()
        losses.append(loss.item())
        return losses

    def windows(self, batch: dict) -> list[float]:
        """MLAAN's two streams. Block j alone, from the detached output of the block before; and a cascade of the last blocks,
        from the detached output of the block before them. Running statistics move once, in the first stream."""
        starts = [0, *(cut + 1 for cut in self.cuts)]
        losses, features, inputs = [], [], [batch['inputs']]
        for j, (cut, head) in enumerate(zip(self.cuts, self.heads, strict=True)):
            alone = inputs[j]
            for i in range(starts[j], cut + 1):
                alone = self.units[i](alone)
                if i in self.taps:
                    features.append(alone.detach())
            first = max(0, j - self.window + 1)
            cascade = self.run_again(starts[first], cut + 1, inputs[first])
            loss = 0.001 * head.own_loss(alone, batch) + 0.999 * head(cascade, batch)
            (loss / self.accumulate).backward()
            losses.append(loss.item())
            inputs.append(alone.detach())
        x = entry = inputs[-1].requires_grad_()
        for i in range(starts[-1], len(self.units)):
            x = self.units[i](x)
            if i in self.taps:
                features.append(x)
        loss = self.task_loss(features, batch)  # of both streams: 0.001 + 0.999 = 1
        (loss / self.accumulate).backward()
        losses.append(loss.item())
        first = max(0, len(self.heads) - self.window + 1)
        self.run_again(starts[first], starts[-1], inputs[first].detach()).backward(0.999 * entry.grad)
        return losses

    def run_again(self, start: int, end: int, x: Tensor) -> Tensor:
        """The units from ``start`` to ``end`` once more, without another update of their buffers."""
        before = [(buffer, buffer.clone()) for unit in self.units[start:end] for buffer in unit.buffers()]
        for unit in self.units[start:end]:
            x = unit(x)
        for buffer, value in before:
            buffer.data.copy_(value)
        return x

    def update(self) -> None:
        if self.max_norm is not None:
            for group in self.groups:
                torch.nn.utils.clip_grad_norm_([p for p in group if p.grad is not None], self.max_norm)
        self.optim.step()
        self.optim.zero_grad()
        with torch.no_grad():
            for head in self.heads:
                if head.momentum is not None:
                    copy, source = head.momentum.state_dict(), head.source.state_dict()
                    for name, value in copy.items():
                        if value.is_floating_point():
                            value.copy_(torch.lerp(value, source[name], 1 - self.momentum))
