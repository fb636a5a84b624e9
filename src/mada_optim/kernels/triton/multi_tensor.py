"""Any elementwise family on a GPU, all parameters in one launch: kernels as :mod:`mada_optim.kernels.triton.source`
writes them.

A launch costs as much time as moving a million numbers, and a model has hundreds of parameters.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor
from mada_optim.kernels.passes import Pass
from mada_optim.kernels.traced.compiled import in_place, key_of
from mada_optim.kernels.traced.trace import Trace, trace
from mada_optim.kernels.triton import source as triton_source
from mada_optim.kernels.triton.expressions import UnsupportedError
from mada_optim.kernels.triton.launch import EXACT, load
from mada_optim.kernels.triton.scalars import change_numbers
from mada_optim.tensors.blocks import Block
from mada_optim.tensors.devices import move_numbers, number_on
from mada_optim.tensors.distributed import PLAIN
from mada_optim.tensors.rounding import mix

TILE = 8192  # elements of a program of the kernel
BLOCK = 512  # that it works on at a time
# A thread has four float32 of a block, which are read at once, and so few registers that enough threads run at a time.
OPTIONS = {"num_warps": 4, **EXACT} if torch.version.hip else {"num_warps": 4, "maxnreg": 128, **EXACT}

# At the head of a table, as float64: step, learning rate, weight decay; for step t and for step t+1.
_HEAD = 4


class TritonExecutor(Executor):
    """Passes for many tensors at once.

    Args:
        otherwise: what carries out passes that cannot be written in Triton.
    """

    run_on_numbers = staticmethod(change_numbers)

    def __init__(self, otherwise: Executor) -> None:
        self._kernels: dict[Any, _Kernel | None] = {}
        self._otherwise = otherwise

    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """See :meth:`Executor.run`."""
        if "columns" not in batch.notes:
            regular = _Columns.of_all(batch)
            batch.notes["columns"] = _Columns.of_any(batch) if regular is None else [regular]
        all_columns: list[_Columns] = batch.notes["columns"]
        kernels = [self._kernel(task, batch, columns, values) for columns in all_columns]
        if None in kernels:
            batch.refresh()  # copies of what is about to change
            return self._otherwise.run(task, batch, values)
        total: Tensor | None = None
        for kernel, columns in zip(kernels, all_columns, strict=True):
            assert kernel is not None
            derivatives = kernel(batch, values, columns)
            if derivatives is not None:
                total = derivatives if total is None else total + derivatives
            columns.write_back(task.writes)
        batch.note_writes(
            task.writes, [x for columns in all_columns for role in task.writes for x in columns.tensors[role]]
        )
        return None if total is None else move_numbers(total, values.device)

    def _kernel(self, task: Pass, batch: Batch, columns: _Columns, values: Tensor) -> _Kernel | None:
        roles = list(columns.tensors)
        dtypes = {role: columns.tensors[role][0].dtype for role in dict.fromkeys((*task.reads, *task.writes))}
        key = (*key_of(task, batch), tuple(roles), tuple(dtypes.items()))
        if key not in self._kernels:
            tensors = {role: torch.empty(8, dtype=dtype, device=batch.device) for role, dtype in dtypes.items()}
            numbers = [values.to(batch.device), *(number_on(1.0, batch.device) for _ in range(3))]
            seed = torch.zeros((), dtype=torch.int64, device=batch.device)
            parts = trace(in_place(task, batch), tensors, [*numbers, seed])
            try:
                self._kernels[key] = _Kernel(parts, roles, dtypes, batch.dtype, task.later)
            except UnsupportedError:
                self._kernels[key] = None
        return self._kernels[key]


class _Columns:
    """Parameters whose tensors have the same dtypes, all tensors of each: contiguous.

    Attributes:
        numbers: of the parameters in their batch.
        sizes: how many elements each of them has.
        tensors: by role, those of each parameter.
    """

    def __init__(self, numbers: list[int], sizes: list[int], tensors: dict[str, list[Tensor]]) -> None:
        self.numbers, self.sizes, self.tensors = numbers, sizes, tensors
        self._copied: list[tuple[Block, str, Tensor]] = []
        self._table: tuple[Tensor, bool] | None = None

    @classmethod
    def of_all(cls, batch: Batch) -> _Columns | None:
        """Return all parameters of a batch as they are stored; None where that cannot be.

        Loops within Python's builtins look at all tensors, for there are thousands.
        """
        tensors = batch.columns
        if tensors is None:
            return None
        params = tensors["param"]
        everything = [tensor for column in tensors.values() for tensor in column]
        sizes = list(map(Tensor.numel, params))
        regular = (
            set(map(type, everything)) <= PLAIN
            and set(map(Tensor.get_device, everything)) == {params[0].get_device()}
            and all(map(Tensor.is_contiguous, everything))
            and not any(map(Tensor.is_neg, params))
            and all(len({tensor.dtype for tensor in column}) == 1 for column in tensors.values())
            and all(list(map(Tensor.numel, column)) == sizes for column in tensors.values())
            and any(sizes)
        )
        return cls(list(range(len(sizes))), sizes, tensors) if regular else None

    @classmethod
    def of_any(cls, batch: Batch) -> list[_Columns]:
        """The parameters that have elements, with copies of what is not contiguous or is stored with another sign."""
        columns_by_dtypes: dict[tuple[tuple[str, torch.dtype], ...], _Columns] = {}
        for number, roles in enumerate(batch.roles):
            param = roles["param"]
            if any(tensor.shape != param.shape or tensor.device != param.device for tensor in roles.values()):
                raise RuntimeError(
                    f"a parameter has shape {tuple(param.shape)} and is on {param.device}, of its tensors "
                    + ", ".join(f"{role} {tuple(tensor.shape)} on {tensor.device}" for role, tensor in roles.items())
                )
            if param.numel():
                key = tuple((role, tensor.dtype) for role, tensor in roles.items())
                columns_by_dtypes.setdefault(key, cls([], [], {role: [] for role in roles}))._add(
                    number, Block([roles])
                )
        return list(columns_by_dtypes.values())

    def _add(self, number: int, block: Block) -> None:
        for role, column in self.tensors.items():
            flat, in_place = block.flat(role)
            tensor = flat.resolve_neg().contiguous()
            if not in_place or tensor.data_ptr() != flat.data_ptr():
                self._copied.append((block, role, tensor))
            column.append(tensor)
        self.numbers.append(number)
        self.sizes.append(tensor.numel())

    def write_back(self, written: Sequence[str]) -> None:
        """Store what was computed in copies."""
        for block, role, tensor in self._copied:
            if role in written:
                block.write_flat(role, tensor)

    def table(self, batch: Batch) -> tuple[Tensor, bool]:
        """The table, on the device, for which the program does not wait; and whether all tensors are aligned."""
        if self._table is None:
            self._table = self._make_table(batch)
        return self._table

    def _make_table(self, batch: Batch) -> tuple[Tensor, bool]:
        step, lr, weight_decay = float(batch.step), batch.group["lr"], batch.group["weight_decay"]
        lr_on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        numbers = [0.0 if lr_on_device else float(lr), weight_decay, 0.0]
        table = array("q", array("d", [step, *numbers, step + 1, *numbers]).tobytes())
        table.extend(self.sizes)
        random = any(column[0].dtype == torch.bfloat16 for column in self.tensors.values())
        for t in (int(step), int(step) + 1):
            table.extend([mix(batch.index, number, t) if random else 0 for number in self.numbers])
        places = len(table)
        for column in self.tensors.values():
            table.extend(map(Tensor.data_ptr, column))
        host = torch.frombuffer(table, dtype=torch.int64)
        aligned = not bool((host[places:] % triton_source.ALIGNMENT).any())
        if batch.device.type == "cpu":
            return host.clone(), aligned
        table_there = host.pin_memory().to(batch.device, non_blocking=True)
        if lr_on_device:
            table_there[1 : 2 * _HEAD : _HEAD].view(torch.float64).copy_(lr.detach().reshape(1))
        return table_there, aligned


class _Kernel:
    """A function for all parameters at once.

    Args:
        parts: the function.
        roles: of the tensors in the table.
        dtypes: of those that it takes.
        dtype: of the arithmetic.
        later: whether it is of step t+1, not of step t.
    """

    def __init__(
        self, parts: Trace, roles: Sequence[str], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, later: bool
    ) -> None:
        self._before = load(triton_source.write_before(parts)) if parts.carried else None
        self._during = load(triton_source.write_for_tensors(parts, roles, dtypes, dtype, later))
        self._add_up = load(triton_source.ADD_UP) if parts.results else None
        self._carried, self._results = map(triton_source.count_numbers, (parts.carried, parts.results))
        self._later = later

    def __call__(self, batch: Batch, values: Tensor, columns: _Columns) -> Tensor | None:
        """Return the result, summed over all elements."""
        table, aligned = columns.table(batch)
        head = table[self._later * _HEAD : (self._later + 1) * _HEAD].view(torch.float64)
        tiles = _tiles(tuple(columns.sizes), batch.device)
        count = len(tiles)
        sizes = [_even(self._carried), _even(self._results), self._results * count]
        space = torch.empty(sum(sizes), dtype=torch.float64, device=batch.device)
        numbers, results, partial = torch.split(space, sizes)
        device = batch.device
        if self._before is not None:
            self._before.launch(device, 1, (values.to(device), head, numbers), num_warps=1, **EXACT)
        arguments = (table[2 * _HEAD :], len(columns.sizes), tiles, numbers, partial)
        for tiles_of_aligned in (True,) if aligned else (True, False):
            self._during.launch(device, count, arguments, (TILE, BLOCK, tiles_of_aligned), **OPTIONS)
        if self._add_up is None:
            return None
        constants = (triton_source.LANES,)
        self._add_up.launch(device, self._results, (partial, count, results), constants, num_warps=8, **EXACT)
        return results[: self._results]


def _even(count: int) -> int:
    """Return an even count, not less, so that what follows is aligned. Triton would compile anew otherwise."""
    return count + count % 2


@lru_cache(maxsize=64)
def _tiles(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the parameter of each program and which tile of it, shape (tiles, 2), int32."""
    counts = torch.tensor([-(-size // TILE) for size in sizes])
    rows = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    tiles = torch.stack([rows, torch.arange(len(rows)) - starts], dim=1)
    return tiles.to(torch.int32).to(device)
