"""Common layouts of backbones: stages of units behind a stem, and layers of one width behind an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mmman.partition.calls import Call
from mmman.partition.chain import STEM, Chain, Unit

Grouping = Callable[[list[str]], list[tuple[str, ...]]]
"""From the paths of a stage's modules, in order, to the paths of each unit."""

Calls = Mapping[str, Call]
"""The paths of modules in the order in which they run, and how each is called."""


def stem(*paths: str, tensors: tuple[str, ...] = ()) -> Unit:
    """A stem whose output is that of the last of its modules."""
    return Unit(STEM, paths, paths[-1], 0, tensors)


def children(backbone: nn.Module, path: str) -> list[str]:
    """Paths of the children of the module at ``path``, in order."""
    return [f'{path}.{name}' for name, _ in backbone.get_submodule(path).named_children()]


def one_each(paths: list[str]) -> list[tuple[str, ...]]:
    """Every module of a stage is a unit."""
    return [(path,) for path in paths]


def first_two(paths: list[str]) -> list[tuple[str, ...]]:
    """The first two modules of a stage, a downsampling layer and a block, are one unit, and every other one is a unit."""
    return [tuple(paths[:2]), *one_each(paths[2:])]


def in_pairs(paths: list[str]) -> list[tuple[str, ...]]:
    """Every two modules of a stage are one unit."""
    return [tuple(paths[i : i + 2]) for i in range(0, len(paths), 2)]


def staged(
    backbone: nn.Module,
    first: Unit,
    layers: Sequence[str],
    out_indices: Iterable[int] | None = None,
    group: Grouping = one_each,
) -> Chain:
    """A stem, then stages: one output for each stage in ``out_indices``.

    Args:
        backbone: The backbone.
        first: The stem.
        layers: Paths of the stages, each a ``Sequential`` or a single unit.
        out_indices: Indices of the stages that make outputs. Default: ``backbone.out_indices``.
        group: How the modules of a ``Sequential`` make units.
    """
    out_indices = backbone.out_indices if out_indices is None else out_indices
    units, out_units = [first], []
    for stage, layer in enumerate(layers):
        is_sequential = isinstance(backbone.get_submodule(layer), nn.Sequential)
        paths = group(children(backbone, layer)) if is_sequential else [(layer,)]
        units += [Unit.sequence(modules, stage) for modules in paths]
        if stage in out_indices:
            out_units.append(len(units) - 1)
    return Chain(tuple(units), tuple(out_units))


def stem_in_list(backbone: nn.Module, layers: Sequence[str], group: Grouping = one_each) -> Chain:
    """:func:`staged` for a backbone whose list of stages begins with the stem, which ``out_indices`` counts as stage 0."""
    indices = backbone.out_indices
    chain = staged(backbone, stem(layers[0]), layers[1:], [i - 1 for i in indices if i > 0], group)
    return replace(chain, out_units=(0, *chain.out_units)) if 0 in indices else chain


def isotropic(
    backbone: nn.Module,
    embedding: tuple[str, ...],
    layers: str,
    tensors: tuple[str, ...] = (),
    joins_first_layer: bool = False,
    **options: Any,
) -> Chain:
    """An embedding, then layers of one width, in a single stage: one output for each layer in ``backbone.out_indices``.

    Args:
        backbone: The backbone.
        embedding: Paths of the modules in front of the layers.
        layers: Path of the list of layers.
        tensors: The backbone's own parameters and buffers that the embedding uses.
        joins_first_layer: Make one unit of the embedding and the first layer. For a backbone that changes the output of the
            last embedding module in front of the layers, so that no module returns what the first layer takes.
        options: Further arguments of :class:`Chain`.
    """
    paths = children(backbone, layers)
    out_units = [i for i in range(len(paths)) if i in backbone.out_indices]
    if joins_first_layer:
        units = [Unit(paths[0], (*embedding, paths[0]), paths[0], 0, tensors), *(Unit.single(path, 0) for path in paths[1:])]
    else:
        units = [stem(*embedding, tensors=tensors), *(Unit.single(path, 0) for path in paths)]
        out_units = [1 + i for i in out_units]
    return Chain(tuple(units), tuple(out_units), **options)


def pyramid(
    stages: Iterable[tuple[Calls, Sequence[Calls], Calls]], out_indices: Iterable[int], attends_everywhere: bool = False
) -> Chain:
    """Stages of an embedding, blocks and a norm: each stage embeds the map that the norm of the stage before it makes.

    The embedding is part of the unit of the stage's first block, and the norm of that of its last block. A unit has the name of
    its block. The backbone's first unit is no stem, because an embedding returns a grid beside its output.

    Args:
        stages: For each stage the modules of the embedding, those of each block, and those behind the last block.
        out_indices: Indices of the stages that make outputs.
        attends_everywhere: See :class:`Chain`.
    """
    units, out_units = [], []
    for i, (embedding, blocks, norm) in enumerate(stages):
        for j, block in enumerate(blocks):
            calls = {**(embedding if j == 0 else {}), **block, **(norm if j == len(blocks) - 1 else {})}
            units.append(Unit(next(iter(block)), tuple(calls), [*calls][-1], i, calls=tuple(calls.values())))
        if i in out_indices:
            out_units.append(len(units) - 1)
    return Chain(tuple(units), tuple(out_units), needs_hw_shape=True, attends_everywhere=attends_everywhere)


def output_norms(backbone: nn.Module) -> Mapping[int, str]:
    """Norms named ``norm<i>`` on the outputs of the stages i in ``backbone.out_indices``."""
    return {element: f'norm{i}' for element, i in enumerate(sorted(backbone.out_indices))}


def own_tensors(backbone: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of ``names`` that are parameters or buffers of the backbone itself."""
    own = {**dict(backbone.named_parameters(recurse=False)), **dict(backbone.named_buffers(recurse=False))}
    return tuple(name for name in names if name in own)
