"""How the matrices of a parameter lie in its tensor: alone, in a stack, or side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the matrices of a parameter lie in its tensor.

    The first dimension of a tensor counts as rows, all others together as columns. In a stack the first dimension
    counts matrices, the second rows, all others together columns.

    Args:
        stacked: whether the first dimension counts matrices, such as those of experts. Default: False.
        dim: along what several matrices lie side by side: 0 along the rows (``nn.Linear``), 1 along the columns.
            Default: 0.
        parts: relative sizes of the matrices along ``dim``: (1, 1, 1) for queries, keys and values of the same size,
            (4, 1, 1) where four heads share a key. Default: (1,), one matrix.
        repeats: how often this pattern repeats along ``dim``. The same parts of all repeats make one matrix.
            Default: 1.

    Raises:
        ValueError: a value is out of its range.

    >>> fused = torch.arange(12.0).view(6, 2)
    >>> [tuple(part.shape) for part in Layout(parts=(4, 1, 1)).cut(fused)]
    [(1, 4, 2), (1, 1, 2), (1, 1, 2)]
    """

    stacked: bool = False
    dim: int = 0
    parts: tuple[int, ...] = (1,)
    repeats: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not isinstance(self.stacked, bool):
            raise ValueError(f"split: stacked must be a bool, got {self.stacked!r}")
        if self.dim not in (0, 1):
            raise ValueError(f"split: dim must be 0 (rows) or 1 (columns), got {self.dim!r}")
        if not self.parts or not all(_is_count(size) for size in self.parts):
            raise ValueError(f"split: parts must be integers of at least 1, got {self.parts!r}")
        if not _is_count(self.repeats):
            raise ValueError(f"split: repeats must be an integer of at least 1, got {self.repeats!r}")

    @classmethod
    def read(cls, split: Any) -> Layout:
        """The layout that the option ``split`` of a parameter group stands for.

        Args:
            split: None: one matrix. A number: as many matrices of the same size along the rows. A sequence: their
                relative sizes. A mapping: the arguments of a layout. A layout: that one.

        >>> Layout.read(3)
        Layout(stacked=False, dim=0, parts=(1, 1, 1), repeats=1)
        """
        if split is None:
            return cls()
        if isinstance(split, Layout):
            return split
        if _is_count(split):
            return cls(parts=(1,) * split)
        if isinstance(split, Mapping):
            names = cls.__dataclass_fields__
            unknown = [name for name in split if name not in names]
            if unknown:
                raise ValueError(f"split: no option {unknown[0]!r}; there are {', '.join(names)}")
            return cls(**split)
        if isinstance(split, Sequence) and not isinstance(split, str):
            return cls(parts=tuple(split))
        raise ValueError(
            f"split must be None, a number of matrices, their relative sizes or a mapping with "
            f"{', '.join(cls.__dataclass_fields__)}, got {split!r}"
        )

    def plain(self) -> dict[str, Any] | None:
        """What :meth:`read` reads, in Python's own types, as parameter groups and checkpoints keep it."""
        return None if self == Layout() else asdict(self)

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError where a tensor of this shape cannot be cut so."""
        if len(shape) < 2 + self.stacked:
            raise ValueError(f"split: {self} needs {2 + self.stacked} or more dimensions, got shape {tuple(shape)}")
        length = self._sizes(shape)[1 + self.dim]
        if length % (sum(self.parts) * self.repeats):
            raise ValueError(
                f"split: {'columns' if self.dim else 'rows'} of shape {tuple(shape)} are {length}, which "
                f"{sum(self.parts)} parts, repeated {self.repeats} times, do not divide"
            )

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """How many matrices there are of each part, and their rows and columns.

        >>> Layout(stacked=True, parts=(1, 1)).shapes((8, 6, 4))
        [(8, 3, 4), (8, 3, 4)]
        """
        count, rows, columns = self._sizes(shape)
        if self.dim:
            return [(count, rows, length) for length in self._lengths(columns)]
        return [(count, length, columns) for length in self._lengths(rows)]

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of a tensor: for each part a stack, shape (N, rows, columns), which may share its memory."""
        matrices = tensor.reshape(self._sizes(tensor.shape))
        if len(self.parts) == 1:
            return [matrices]
        dim = 1 + self.dim
        if self.repeats == 1:
            return list(torch.split(matrices, self._lengths(matrices.size(dim)), dim))
        pattern = torch.unflatten(matrices, dim, (self.repeats, -1))
        return [
            part.flatten(dim, dim + 1) for part in torch.split(pattern, self._lengths(pattern.size(dim + 1)), dim + 1)
        ]

    def ranges(self, length: int) -> list[tuple[tuple[int, int], ...]]:
        """Where each part lies along ``dim``, which has this length: elements [start, stop), for each repeat.

        >>> Layout(parts=(2, 1), repeats=2).ranges(12)
        [((0, 4), (6, 10)), ((4, 6), (10, 12))]
        """
        period = length // self.repeats
        stops = list(itertools.accumulate(self._lengths(period)))
        return [
            tuple((first + start, first + stop) for first in range(0, length, period))
            for start, stop in zip([0, *stops], stops, strict=False)
        ]

    def join(self, matrices: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The inverse of :meth:`cut`: a tensor of this shape."""
        dim = 1 + self.dim
        if self.repeats == 1:
            return (torch.cat(list(matrices), dim) if len(matrices) > 1 else matrices[0]).reshape(shape)
        parts = [torch.unflatten(part, dim, (self.repeats, -1)) for part in matrices]
        return torch.cat(parts, dim + 1).reshape(shape)

    def row_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a tensor with one number for each row of each matrix: as many columns as lie side by side.

        >>> Layout().row_shape(torch.Size([6, 4, 3])), Layout(dim=1, parts=(1, 1)).row_shape(torch.Size([6, 4]))
        ((6, 1), (6, 2))
        """
        return (*shape[: 1 + self.stacked], len(self.parts) if self.dim == 1 else 1)

    def rows(self) -> Layout:
        """How the matrices lie in a tensor of :meth:`row_shape`, where each has one column."""
        return replace(self, parts=(1,) * len(self.parts), repeats=1) if self.dim == 1 else self

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many matrices, rows and columns there are, before they are cut."""
        if self.stacked:
            return shape[0], shape[1], math.prod(shape[2:])
        return 1, shape[0], math.prod(shape[1:])

    def _lengths(self, length: int) -> list[int]:
        return [length // sum(self.parts) * size for size in self.parts]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
