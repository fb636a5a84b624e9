"""What each parameter of a model is, as a table that people can read."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, overload

from torch import nn

from mada_optim.matrices.which import Parameter, classify

COLUMNS = ("name", "shape", "what", "matrices", "why")


@dataclass(frozen=True)
class Description(Sequence[Parameter]):
    """What each parameter of a model is: a sequence with one entry for each, and a table when it is printed.

    The table has one line for parameters that differ in the numbers of their names alone, such as those of layers.
    """

    parameters: tuple[Parameter, ...]

    @overload
    def __getitem__(self, index: int) -> Parameter: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Parameter, ...]: ...
    def __getitem__(self, index: int | slice) -> Parameter | tuple[Parameter, ...]:
        return self.parameters[index]

    def __len__(self) -> int:
        return len(self.parameters)

    def lines(self) -> list[tuple[str, ...]]:
        """The table without its head: name, shape, what, matrices, why."""
        return [
            (
                folded.name + (f" ×{folded.count}" if folded.count > 1 else ""),
                _by(folded.parameter.shape),
                folded.parameter.what + ("" if folded.parameter.trained else ", frozen"),
                matrices_of(folded.parameter),
                folded.parameter.why,
            )
            for folded in _fold(self.parameters)
        ]

    def summary(self) -> str:
        """How many numbers are in matrices."""
        everything = sum(math.prod(parameter.shape) for parameter in self)
        matrices = sum(math.prod(parameter.shape) for parameter in self if parameter.is_matrix)
        share = 100 * matrices / max(everything, 1)
        return f"{matrices:,} of {everything:,} numbers are in matrices ({share:.0f} %)."

    def __str__(self) -> str:
        rows = [COLUMNS, *self.lines()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join((*lines, self.summary()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self.lines()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{self.summary()}</p>"


def describe(
    model: nn.Module, matrices: Mapping[str, bool] | None = None, split: Mapping[str, Any] | None = None
) -> Description:
    """Say what :class:`mada_optim.OMADA` takes each parameter of a model for, why, and how it splits matrices.

    Args:
        model: any module.
        matrices, split: the user's word, by patterns of names; see :class:`mada_optim.OMADA`.

    Returns:
        A sequence of entries with ``name``, ``shape``, ``what``, ``why``, ``layout`` and ``trained``. Printed, it is a
        table.

    >>> print(describe(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 12), nn.Linear(12, 10)), split={"1.weight": 3}))
    name      shape    what          matrices  why
    --------  -------  ------------  --------  ------------------------------
    0.weight  10 × 4   embedding               one row for each entry
    1.weight  12 × 4   matrix        3 of 4×4  as you say
    1.bias    12       bias                    added to activations
    2.weight  10 × 12  output layer            one row for each of 10 entries
    2.bias    10       bias                    added to activations
    48 of 230 numbers are in matrices (21 %).
    """
    return Description(tuple(classify(model, matrices, split).values()))


def matrices_of(parameter: Parameter) -> str:
    """How many matrices a parameter has, and of which shapes."""
    if parameter.layout is None:
        return ""
    shapes = parameter.layout.shapes(parameter.shape)
    parts = []
    for shape, alike in groupby(shapes):
        count, rows, columns = shape
        many = count * len(list(alike))
        parts.append(f"{many} of {rows}×{columns}" if many > 1 else f"{rows}×{columns}")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Folded:
    """Parameters that differ in the numbers of their names alone."""

    name: str
    parameter: Parameter
    count: int


def _fold(parameters: Sequence[Parameter]) -> Iterator[_Folded]:
    """One entry for all parameters that are alike in all but numbers of their names, where the first of them is.

    The numbers have to be all of a range, or of a product of ranges, for the name to say which they are.
    """
    rows = [(tuple(parameter.name.split(".")), parameter, 1) for parameter in parameters]
    for position in reversed(range(max((len(names) for names, *_ in rows), default=0))):
        rows = _fold_at(position, rows)
    for names, parameter, count in rows:
        yield _Folded(".".join(names), parameter, count)


_Row = tuple[tuple[str, ...], Parameter, int]


def _fold_at(position: int, rows: Sequence[_Row]) -> list[_Row]:
    """Rows that differ in one number of their names become one."""
    rows_by_pattern: dict[Any, list[_Row]] = {}
    for row in rows:
        names, parameter, _ = row
        numbered = position < len(names) and names[position].isdecimal()
        others = (*names[:position], *names[position + 1 :]) if numbered else names
        traits = (parameter.shape, parameter.what, parameter.why, parameter.layout, parameter.trained)
        rows_by_pattern.setdefault((numbered, others, traits), []).append(row)
    folded = []
    for (numbered, *_), members in rows_by_pattern.items():
        names, parameter, count = members[0]
        if numbered and len(members) > 1:
            numbers = [int(member[0][position]) for member in members]
            names = (*names[:position], _range(numbers), *names[position + 1 :])
            count *= len(members)
        folded.append((names, parameter, count))
    return folded


def _range(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "()"
