"""Any elementwise family on a GPU, all parameters in one launch: kernels as :mod:`mada_optim.kernels.triton.source`
writes them.

A launch costs as much time as moving a million numbers, and a model has hundreds of parameters.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor
from mada_optim.kernels.passes import CompleteAndTake, Pass
from mada_optim.kernels.traced.compiled import in_place, key_of
from mada_optim.kernels.traced.trace import Trace, trace
from mada_optim.kernels.triton import source as triton_source
from mada_optim.kernels.triton.columns import Columns, find_columns
from mada_optim.kernels.triton.expressions import UnsupportedError
from mada_optim.kernels.triton.launch import EXACT, load
from mada_optim.kernels.triton.scalars import change_numbers
from mada_optim.kernels.triton.source import HEAD
from mada_optim.tensors.devices import constant, move_numbers, number_on, send

TILE = 8192  # elements of a program of the kernel
BLOCK = 512  # that it works on at a time
WARPS = 4  # that do it: a thread has four float32 of a block, which are read at once
REGISTERS = {True: 168, False: 128}  # of a thread, for both steps at once and for one: 12 or 16 warps run at a time


class TritonExecutor(Executor):
    """Passes for many tensors at once.

    Args:
        otherwise: what carries out passes that cannot be written in Triton.
    """

    counts_each = True
    run_on_numbers = staticmethod(change_numbers)

    def __init__(self, otherwise: Executor) -> None:
        self._kernels: dict[Any, _Kernel | None] = {}
        self._otherwise = otherwise

    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """See :meth:`Executor.run`."""
        if "columns" not in batch.notes:
            batch.notes["columns"] = found = find_columns(batch)
            batch.notes["tiles"] = [_tiles(batch.params[0], tuple(columns.sizes), TILE) for columns in found]
            batch.notes["heads"] = _make_heads(batch)
        all_columns: list[Columns] = batch.notes["columns"]
        kernels = [self._kernel(task, batch, columns, values) for columns in all_columns]
        if None in kernels:
            batch.refresh()  # copies of what is about to change
            return _total(self._otherwise.run(task, each, values) for each in batch.by_count())
        total = _total(
            kernel(batch, values, columns, tiles)
            for kernel, columns, tiles in zip(kernels, all_columns, batch.notes["tiles"], strict=True)
            if kernel is not None
        )
        for columns in all_columns:
            columns.write_back(task.writes)
        written = (columns.tensors[role] for columns in all_columns for role in task.writes)
        batch.note_writes(task.writes, chain.from_iterable(written))
        return None if total is None else move_numbers(total, values.device)

    def _kernel(self, task: Pass, batch: Batch, columns: Columns, values: Tensor) -> _Kernel | None:
        key = (*key_of(task, batch), tuple(columns.dtypes.items()))
        if key not in self._kernels:
            dtypes = {role: columns.dtypes[role] for role in dict.fromkeys((*task.reads, *task.writes))}
            tensors = {role: torch.empty(8, dtype=dtype, device=batch.device) for role, dtype in dtypes.items()}
            numbers = [values.to(batch.device), *(number_on(1.0, batch.device) for _ in range(3))]
            place = torch.zeros((), dtype=torch.int64, device=batch.device)
            parts = trace(in_place(task, batch), tensors, [*numbers, place])
            try:
                self._kernels[key] = _Kernel(parts, list(columns.dtypes), dtypes, batch.dtype, task)
            except UnsupportedError:
                self._kernels[key] = None
        return self._kernels[key]


class _Kernel:
    """A function for all parameters at once.

    Args:
        parts: the function.
        roles: of the tensors in the table.
        dtypes: of those that it takes.
        dtype: of the arithmetic.
        task: that the function carries out.
    """

    def __init__(
        self, parts: Trace, roles: Sequence[str], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, task: Pass
    ) -> None:
        self._before = load(triton_source.write_before(parts)) if parts.carried else None
        self._during = load(triton_source.write_for_tensors(parts, roles, dtypes, dtype))
        self._add_up = load(triton_source.ADD_UP) if parts.results else None
        self._carried, self._results = map(triton_source.count_numbers, (parts.carried, parts.results))
        self._later = task.later
        limit = {} if torch.version.hip else {"maxnreg": REGISTERS[isinstance(task, CompleteAndTake)]}
        self._options = {"num_warps": WARPS, **limit, **EXACT}

    def __call__(self, batch: Batch, values: Tensor, columns: Columns, tiles: Tensor) -> Tensor | None:
        """Return the result, summed over all elements."""
        device, count, head = batch.device, len(tiles), batch.notes["heads"][int(self._later)]
        sizes = [_even(self._carried * len(head)), _even(self._results), self._results * count]
        space = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        numbers, results, partial = space.split_with_sizes(sizes)
        if self._before is not None:
            self._before.launch(device, len(head), (values.to(device), head, numbers), num_warps=1, **EXACT)
        arguments = (columns.table, len(columns.sizes), tiles, numbers, partial)
        for tiles_of_aligned in (True,) if columns.aligned else (True, False):
            self._during.launch(device, count, arguments, (TILE, BLOCK, tiles_of_aligned), **self._options)
        if self._add_up is None:
            return None
        constants = (triton_source.LANES,)
        self._add_up.launch(device, self._results, (partial, count, results), constants, num_warps=8, **EXACT)
        return results[: self._results]


def _make_heads(batch: Batch) -> Tensor:
    """Return step, learning rate and weight decay, as float64 on the device: for step t and for step t+1, rows of them.

    Where each parameter has a count of its own, there is a row for each of them, and nothing comes from the host.
    """
    counts, lr, weight_decay = batch.counts, batch.group["lr"], batch.group["weight_decay"]
    lr = lr.detach().reshape(()) if isinstance(lr, Tensor) else lr
    if counts is not None:
        heads = torch.empty(2, len(counts), HEAD, dtype=torch.float64, device=batch.device)
        heads[..., 0].copy_(torch.stack([count.to(batch.device) for count in counts]))
        heads[1, :, 0].add_(1)
        heads[..., 1].fill_(lr)
        heads[..., 2].fill_(weight_decay)
        return heads
    step, lr_on_device = float(batch.step), isinstance(lr, Tensor) and lr.device.type != "cpu"
    numbers = [0.0 if lr_on_device else float(lr), weight_decay, 0.0]
    host = torch.frombuffer(array("d", [step, *numbers, step + 1, *numbers]), dtype=torch.float64)
    heads = send(host, batch.params[0]).view(2, 1, HEAD)
    if lr_on_device:
        heads[..., 1].fill_(lr)
    return heads


def _total(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of what is there."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]) if there else None


def _even(count: int) -> int:
    """Return an even count, not less, so that what follows is aligned. Triton would compile anew otherwise."""
    return count + count % 2


@constant
def _tiles(sizes: tuple[int, ...], tile: int) -> Tensor:
    """Return the parameter of each program and which tile of it, shape (tiles, 2), int32."""
    counts = torch.tensor([-(-size // tile) for size in sizes], device="cpu")
    rows = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    tiles = torch.stack([rows, torch.arange(len(rows), device="cpu") - starts], dim=1)
    return tiles.to(torch.int32)
