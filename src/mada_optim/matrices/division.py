"""Which rank orthogonalizes which matrices. Every rank computes the same answer and asks nobody.

Ranks are numbered as their process group numbers them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from mada_optim.matrices.layout import Layout
from mada_optim.tensors.distributed import Ranges, Spread

Box = tuple[slice, ...]
View = tuple[int, Box]


@dataclass(frozen=True)
class Task:
    """One matrix, or several of one tensor, for one rank.

    Args:
        tensor: index of the tensor.
        ranges: the elements of each of its dimensions.
        owner: the rank that orthogonalizes it.
        batch: number of the batch in which it is sent.
    """

    tensor: int
    ranges: tuple[Ranges, ...]
    owner: int
    batch: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that has these elements alone."""
        return shape_of(self.ranges)


@dataclass(frozen=True)
class Message:
    """What a rank packs for all ranks, or unpacks from all ranks.

    Args:
        views: for each rank, indices of tensors and boxes in them.
    """

    views: tuple[tuple[View, ...], ...]

    @cached_property
    def counts(self) -> list[int]:
        """Number of elements for each rank."""
        return [sum(box_size(box) for _, box in views) for views in self.views]


@dataclass(frozen=True)
class Batch:
    """What one rank does in one batch.

    Args:
        shapes: the tensors that it orthogonalizes.
        parts_sent: of its parts of all tensors, to the owners.
        parts_received: of its own tasks, from the ranks that hold them.
        directions_sent: of its own tasks, to the ranks that hold them.
        directions_received: of its parts of all tensors, from the owners.
    """

    shapes: tuple[torch.Size, ...]
    parts_sent: Message
    parts_received: Message
    directions_sent: Message
    directions_received: Message


def task_layout(layout: Layout, dims: int) -> Layout:
    """How matrices lie in the tensors of tasks, which hold one of the matrices that lie side by side.

    Args:
        layout: of tensors with this number of dimensions.
        dims: number of dimensions. Columns that spread over several of them are not taken apart.
    """
    separable = layout.dim == 0 or dims == 2 + layout.stacked
    return Layout(stacked=layout.stacked) if separable else layout


@lru_cache(maxsize=64)
def divide(spreads: tuple[Spread, ...], layout: Layout, limit: int) -> list[Task]:
    """Divide matrices among ranks so that all have about the same to compute.

    The next matrix, the largest first, goes to the rank that has least to do. Experts go to ranks that hold a part of
    them, unless that would leave most ranks idle.

    Args:
        spreads: of each tensor.
        layout: how matrices lie in each tensor.
        limit: elements that a rank may send or receive in a batch. One larger matrix makes a batch of its own.

    >>> spread = Spread(torch.Size((8, 4)), ((((0, 4),), ((0, 4),)), (((4, 8),), ((0, 4),))), ((), ()))
    >>> [task.owner for task in divide((spread, spread), Layout(), 1000)]
    [0, 1]
    """
    pieces = [
        (tensor, ranges)
        for tensor, spread in enumerate(spreads)
        for ranges in _pieces(spread, layout, limit)
        if math.prod(shape_of(ranges))
    ]
    costs = [_cost(shape_of(ranges), layout) for _, ranges in pieces]
    count = len(spreads[0].held)
    loads, filled, batches = [0] * count, [0] * count, [0] * count
    tasks = []
    for index in sorted(range(len(pieces)), key=lambda index: (-costs[index], shape_of(pieces[index][1]), index)):
        tensor, ranges = pieces[index]
        spread = spreads[tensor]
        at_home = layout.stacked and not _leaves_most_idle(spread)
        owner = min(_holders(spread, ranges) if at_home else range(count), key=lambda rank: (loads[rank], rank))
        size = math.prod(shape_of(ranges)) * len(set(spread.copies))
        if filled[owner] and filled[owner] + size > limit:
            filled[owner] = 0
            batches[owner] += 1
        loads[owner] += costs[index]
        filled[owner] += size
        tasks.append(Task(tensor, ranges, owner, batches[owner]))
    return tasks


@lru_cache(maxsize=64)
def plan(spreads: tuple[Spread, ...], layout: Layout, limit: int, rank: int) -> list[Batch]:
    """What one rank does, batch by batch. Args as in :func:`divide`."""
    tasks = divide(spreads, layout, limit)
    return [
        _batch(spreads, [task for task in tasks if task.batch == number], rank)
        for number in range(1 + max((task.batch for task in tasks), default=-1))
    ]


def boxes(held: tuple[Ranges, ...], wanted: tuple[Ranges, ...]) -> list[tuple[Box, Box]]:
    """What two tensors have in common that hold these elements of a third one: boxes in the first and in the second."""
    overlaps = [_overlap(first, second) for first, second in zip(held, wanted, strict=True)]
    return [
        (tuple(first for first, _ in pairs), tuple(second for _, second in pairs))
        for pairs in itertools.product(*overlaps)
    ]


@lru_cache(maxsize=1024)
def stays_at_home(spread: Spread, layout: Layout) -> bool:
    """Whether ranks hold whole matrices and can orthogonalize those without a message."""
    first = 1 if layout.stacked else 0
    complete = everything(spread.shape)[first:]
    return not _leaves_most_idle(spread) and all(ranges[first:] == complete for ranges in spread.held)


def _leaves_most_idle(spread: Spread) -> bool:
    """Whether more than half of the ranks hold no element."""
    return 2 * sum(not all(ranges) for ranges in spread.held) > len(spread.held)


@lru_cache(maxsize=1024)
def copied(shape: torch.Size, ranks: int) -> Spread:
    """Return the spread of a tensor that every rank holds whole."""
    return Spread(shape, (everything(shape),) * ranks, tuple((rank,) for rank in range(ranks)))


def everything(shape: torch.Size) -> tuple[Ranges, ...]:
    """All elements of a tensor."""
    return tuple(((0, size),) for size in shape)


def _pieces(spread: Spread, layout: Layout, limit: int) -> list[tuple[Ranges, ...]]:
    """The elements of a tensor that make a task each."""
    dims: list[list[Ranges]] = [[ranges] for ranges in everything(spread.shape)]
    if layout.stacked:
        dims[0] = _runs(spread, max(1, limit // max(1, math.prod(spread.shape[1:]))))
    if task_layout(layout, len(spread.shape)) != layout:
        dim = layout.stacked + layout.dim
        dims[dim] = list(layout.ranges(spread.shape[dim]))
    return list(itertools.product(*dims))


def _runs(spread: Spread, longest: int) -> list[Ranges]:
    """Neighbours in a stack: as many as make a fair share, all held by the same ranks."""
    edges = sorted({edge for ranges in spread.held for span in ranges[0] for edge in span})
    runs: list[Ranges] = []
    for start, stop in itertools.pairwise(edges):
        holders = sum(bool(_overlap(ranges[0], ((start, stop),))) for ranges in spread.held)
        length = min(longest, -(-(stop - start) // holders))
        runs += [((first, min(first + length, stop)),) for first in range(start, stop, length)]
    return runs


def _cost(shape: torch.Size, layout: Layout) -> int:
    """Return a cost in proportion to the products of matrices in an iteration on the smaller side."""
    count, matrix = (shape[0], shape[1:]) if layout.stacked else (1, shape)
    short, long = sorted((matrix[0], math.prod(matrix[1:])))
    return count * short**2 * (short + long)


def _batch(spreads: tuple[Spread, ...], tasks: list[Task], rank: int) -> Batch:
    tasks_of_rank = [task for task in tasks if task.owner == rank]
    parts_sent: list[list[View]] = [[] for _ in spreads[0].held]
    parts_received: list[list[View]] = [[] for _ in spreads[0].held]
    directions_sent: list[list[View]] = [[] for _ in spreads[0].held]
    directions_received: list[list[View]] = [[] for _ in spreads[0].held]
    for task in tasks:
        spread = spreads[task.tensor]
        for mine, _ in boxes(spread.held[rank], task.ranges):
            directions_received[task.owner].append((task.tensor, mine))
            if spread.copies[rank] == spread.copies[task.owner]:
                parts_sent[task.owner].append((task.tensor, mine))
    for index, task in enumerate(tasks_of_rank):
        spread = spreads[task.tensor]
        for other, held in enumerate(spread.held):
            for _, its in boxes(held, task.ranges):
                directions_sent[other].append((index, its))
                if spread.copies[other] == spread.copies[rank]:
                    parts_received[other].append((index, its))
    return Batch(
        tuple(task.shape for task in tasks_of_rank),
        *map(_message, (parts_sent, parts_received, directions_sent, directions_received)),
    )


def _message(views: list[list[View]]) -> Message:
    return Message(tuple(map(tuple, views)))


def box_size(box: Box) -> int:
    """Return the number of elements of a box."""
    return math.prod(side.stop - side.start for side in box)


def _holders(spread: Spread, ranges: tuple[Ranges, ...]) -> list[int]:
    return [rank for rank, held in enumerate(spread.held) if boxes(held, ranges)]


def _overlap(held: Ranges, wanted: Ranges) -> list[tuple[slice, slice]]:
    """Return where the elements lie that two sets of ranges have in common: in the first and in the second."""
    overlap = []
    before = 0
    for start, stop in held:
        before_wanted = 0
        for first, last in wanted:
            low, high = max(start, first), min(stop, last)
            if low < high:
                here, there = before - start, before_wanted - first
                overlap.append((slice(here + low, here + high), slice(there + low, there + high)))
            before_wanted += last - first
        before += stop - start
    return overlap


def shape_of(ranges: tuple[Ranges, ...]) -> torch.Size:
    """Shape of a tensor that has these elements alone."""
    return torch.Size(sum(stop - start for start, stop in spans) for spans in ranges)
