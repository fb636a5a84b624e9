"""The tensors of a batch as kernels find them: in columns, one for each role, and by a table of addresses.

What follows from where tensors are and how they lie is kept from step to step. Users may exchange tensors or change
them in place, so all of that is read anew at each step, by loops within Python's builtins: there are thousands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.batch import Columns as Tensors
from mada_optim.kernels.triton.source import ALIGNMENT
from mada_optim.tensors.alike import compare_at_once, never
from mada_optim.tensors.blocks import Block, Roles
from mada_optim.tensors.devices import is_capturing, send, stream_on
from mada_optim.tensors.rounding import noise_place

_dtype = operator.attrgetter("dtype")


@dataclass
class Columns:
    """Parameters whose tensors have the same dtypes, the elements of each in one order and without gaps.

    Args:
        sizes: how many elements each of them has.
        tensors: by role, those of each parameter.
        table: on the device, a row of 64-bit numbers for each of: sizes, places of the noise, which count of steps is
            theirs, addresses of the tensors of each role.
        aligned: whether all tensors are aligned.
        copied: copies among the tensors, with the block and the role that they stand for.
    """

    sizes: Sequence[int]
    tensors: Tensors
    table: Tensor
    aligned: bool
    copied: Sequence[tuple[Block, str, Tensor]] = field(default=())

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each role."""
        return {role: column[0].dtype for role, column in self.tensors.items()}

    def write_back(self, written: Sequence[str]) -> None:
        """Store what was computed in copies."""
        for block, role, tensor in self.copied:
            if role in written:
                block.write_flat(role, tensor)


def find_columns(batch: Batch) -> list[Columns]:
    """Return the columns of a batch in this step: those of tensors as they are stored, and those with copies."""
    stored, plan = batch.stored, batch.kept.get("plan")
    if stored is not None and plan is not None and plan.is_known(batch, stored):
        return [*plan.columns(batch, stored), *_with_copies(batch, plan.rest)]
    tensors = batch.columns
    if tensors is None:
        return _with_copies(batch, range(len(batch.params)))
    layout = Layout.of(tensors)
    if plan is None or plan.layout != layout:
        plan = batch.kept["plan"] = Plan(layout, tensors)
    elif tensors is stored and batch.alike is not None:  # they seem to stay
        plan.know(batch, stored)
    return [*plan.columns(batch, tensors), *_with_copies(batch, plan.rest)]


@dataclass
class Layout:
    """All of some tensors that kernels depend on, except for addresses. It keeps no tensor.

    Args:
        roles: of the tensors.
        dtypes, sizes, contiguous: of each tensor, role by role.
        negative: of each parameter, whether its memory has the opposite sign.
        strides: of all tensors of parameters one of whose tensors is not contiguous.
    """

    roles: Sequence[str]
    dtypes: Sequence[torch.dtype]
    sizes: Sequence[int]
    contiguous: Sequence[bool]
    negative: Sequence[bool]
    strides: Mapping[int, Sequence[tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Tensors) -> Layout:
        """The layout of tensors by role."""
        everything = list(chain.from_iterable(tensors.values()))
        layout = cls(
            list(tensors),
            list(map(_dtype, everything)),
            list(map(Tensor.numel, everything)),
            list(map(Tensor.is_contiguous, everything)),
            list(map(Tensor.is_neg, tensors["param"])),
        )
        if False in layout.contiguous:
            odd = [not all(flags) for flags in layout.by_parameter(layout.contiguous)]
            layout.strides = {
                number: [column[number].stride() for column in tensors.values()]
                for number in compress(range(len(odd)), odd)
            }
        return layout

    def by_parameter(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """For each parameter, those of the values that are about its tensors."""
        count = len(self.sizes) // len(self.roles)
        return [values[number::count] for number in range(count)]


class Plan:
    """What follows from a layout, and the table that was made last.

    Args:
        layout: from which it follows.
        tensors: which have it. None of them is kept.
    """

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        self.layout = layout
        self._alike: object = None
        self._are_alike: Callable[..., bool] = never
        dtypes, sizes = layout.by_parameter(layout.dtypes), layout.by_parameter(layout.sizes)
        usable = [
            len(set(sizes[number])) == 1
            and not negative
            and (number not in layout.strides or _lie_alike(tensors, number))
            for number, negative in enumerate(layout.negative)
        ]
        first = next(compress(dtypes, usable), None)
        self._in_place = [flag and own == first for flag, own in zip(usable, dtypes, strict=True)]
        self._numbers = list(compress(range(len(usable)), self._in_place))
        self._sizes = list(compress(layout.sizes, self._in_place))
        self.rest = [number for number, flag in enumerate(self._in_place) if not flag]
        """Numbers of the parameters whose tensors have to be copied."""
        self._made_for: tuple[int, bool, int | None, dict[str, list[int]]] = -1, False, None, {}
        self._table: tuple[Tensor, bool]

    def know(self, batch: Batch, stored: Tensors) -> None:
        """Know the stored tensors of a batch, which have the layout, and all that are like them."""
        self._alike, self._are_alike = batch.alike, compare_at_once(list(_buffers(stored)))

    def is_known(self, batch: Batch, stored: Tensors) -> bool:
        """Whether the stored tensors of a batch are known to have the layout. If not, it has to be asked."""
        known = batch.alike is not None and batch.alike is self._alike
        return known and list(stored) == self.layout.roles and self._are_alike(*_buffers(stored))

    def columns(self, batch: Batch, tensors: Tensors) -> list[Columns]:
        """The columns of what need not be copied: one set of columns, or none where there are no elements."""
        if not any(self._sizes):
            return []
        if self.rest:
            tensors = {role: list(compress(column, self._in_place)) for role, column in tensors.items()}
        addresses = {role: list(map(Tensor.data_ptr, column)) for role, column in tensors.items()}
        made_for = batch.index, batch.counts is None, stream_on(batch.device), addresses
        capturing = is_capturing(batch.device)
        if capturing or made_for != self._made_for:
            known, device = self._made_for[-1], tensors["param"][0].get_device()
            moved = (column for role, column in tensors.items() if addresses[role] != known.get(role))
            if any(index != device for index in map(Tensor.get_device, chain.from_iterable(moved))):
                for number in self._numbers:
                    _check(batch.roles_of(number))
            table = _make_table(batch, self._numbers, self._sizes, addresses.values())
            if capturing:  # a graph has its own table, which other steps must not use
                return [Columns(self._sizes, tensors, *table)]
            self._table, self._made_for = table, made_for
        return [Columns(self._sizes, tensors, *self._table)]


def _buffers(tensors: Tensors) -> Iterator[Tensor]:
    """All tensors but parameters and gradients."""
    return chain.from_iterable(column for role, column in tensors.items() if role not in ("param", "grad"))


def _lie_alike(tensors: Tensors, number: int) -> bool:
    """Whether all tensors of a parameter have their elements in one order in memory, without gaps."""
    roles = {role: column[number] for role, column in tensors.items()}
    shape, block = roles["param"].shape, Block([roles])
    return all(tensor.shape == shape and block.flat(role)[1] for role, tensor in roles.items())


def _with_copies(batch: Batch, numbers: Iterable[int]) -> list[Columns]:
    """The columns of parameters that have elements, with copies of what lies otherwise or has the opposite sign."""
    alike: dict[Hashable, list[int]] = {}
    for number in numbers:
        roles = batch.roles_of(number)
        _check(roles)
        if roles["param"].numel():
            alike.setdefault(tuple((role, tensor.dtype) for role, tensor in roles.items()), []).append(number)
    return [_copied(batch, same) for same in alike.values()]


def _check(roles: Roles) -> None:
    """Raise RuntimeError where a tensor is not of the shape and on the device of its parameter."""
    param = roles["param"]
    if any(tensor.shape != param.shape or tensor.device != param.device for tensor in roles.values()):
        raise RuntimeError(
            f"a parameter has shape {tuple(param.shape)} and is on {param.device}, of its tensors "
            + ", ".join(f"{role} {tuple(tensor.shape)} on {tensor.device}" for role, tensor in roles.items())
        )


def _copied(batch: Batch, numbers: Sequence[int]) -> Columns:
    """The columns of parameters whose tensors have the same dtypes, with copies."""
    tensors: Tensors = {role: [] for role in batch.roles_of(numbers[0])}
    copied: list[tuple[Block, str, Tensor]] = []
    for number in numbers:
        block = Block([batch.roles_of(number)])
        for role, column in tensors.items():
            flat, in_place = block.flat(role)
            tensor = flat.resolve_neg().contiguous()
            if not in_place or tensor.data_ptr() != flat.data_ptr():
                copied.append((block, role, tensor))
            column.append(tensor)
    sizes = list(map(Tensor.numel, tensors["param"]))
    addresses = (list(map(Tensor.data_ptr, column)) for column in tensors.values())
    return Columns(sizes, tensors, *_make_table(batch, numbers, sizes, addresses), copied)


def _make_table(
    batch: Batch, numbers: Sequence[int], sizes: Sequence[int], addresses: Iterable[Sequence[int]]
) -> tuple[Tensor, bool]:
    """Return the table, on the device, for which the program does not wait; and whether all tensors are aligned."""
    places = [noise_place(batch.index, number) for number in numbers]
    counts = [0] * len(numbers) if batch.counts is None else numbers
    row = list(chain.from_iterable(addresses))
    table = torch.tensor([*sizes, *places, *counts, *row], dtype=torch.int64, device="cpu")
    return send(table, batch.params[0]), not any(address % ALIGNMENT for address in row)
