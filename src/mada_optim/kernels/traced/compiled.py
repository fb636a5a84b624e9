"""Passes of any elementwise family, turned into fused kernels by torch.compile.

A pass is cut in three first, see :mod:`mada_optim.kernels.traced.trace`. Its elementwise part is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor, to_store
from mada_optim.kernels.passes import Numbers, Pass
from mada_optim.kernels.traced.trace import Function, Tensors, trace
from mada_optim.tensors.blocks import make_blocks
from mada_optim.tensors.devices import move_numbers, number_on
from mada_optim.tensors.rounding import noise_place, noise_seed

SMALLEST = 1 << 13


class CompiledExecutor(Executor):
    """Passes fused by torch.compile. Large tensors are handed over one by one, small ones put together.

    A pass is compiled anew only for other dtypes, constants, or sets of learned coefficients.
    """

    def __init__(self) -> None:
        self._programs: dict[Any, _Program] = {}

    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """See :meth:`Executor.run`."""
        step = batch.step + 1 if task.later else batch.step
        numbers = [
            move_numbers(values, batch.device),
            *(number_on(x, batch.device) for x in (step, batch.group["lr"], batch.group["weight_decay"])),
        ]
        program: _Program | None = None
        scalars: list[Tensor] = []
        totals: list[Tensor] = []
        for number, block in enumerate(make_blocks(batch.roles, elementwise=True, cut=False)):
            shared = {role: block.flat(role) for role in dict.fromkeys((*task.reads, *task.writes))}
            # An element that a zero gradient follows adds nothing to the hypergradient.
            tensors = {role: _pad(tensor.detach(), role == "grad") for role, (tensor, _) in shared.items()}
            place = torch.full((), noise_place(batch.index, number), dtype=torch.int64, device=batch.device)
            if program is None:
                program = self._program(task, batch, tensors, [*numbers, place])
                scalars = program.before(*numbers)
            sums = program.during(*tensors.values(), place, *scalars)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            for role in task.writes:
                tensor, in_place = shared[role]
                if not in_place or tensor.numel() < SMALLEST:
                    block.write_flat(role, tensors[role][: tensor.numel()])
        batch.note_writes(task.writes)
        results = [] if program is None else program.after(*scalars, *totals)  # none where no parameter has an element
        return move_numbers(results[0], values.device) if results else None

    def _program(self, task: Pass, batch: Batch, tensors: Tensors, numbers: list[Tensor]) -> _Program:
        key = (*key_of(task, batch), tuple((role, tensor.dtype) for role, tensor in tensors.items()))
        if key not in self._programs:
            self._programs[key] = _Program(in_place(task, batch), tensors, numbers, batch.dtype)
        return self._programs[key]


def key_of(task: Pass, batch: Batch) -> tuple[Any, ...]:
    """Return all that is compiled in, except the dtypes of the tensors."""
    return task.key, batch.dtype, batch.device


def in_place(task: Pass, batch: Batch) -> Function:
    """A pass as a function that is traced: of the stored tensors, into which it writes what it computes."""

    def function(
        tensors: Tensors, values: Tensor, step: Tensor, lr: Tensor, weight_decay: Tensor, place: Tensor
    ) -> list[Tensor]:
        read = {role: tensors[role].to(batch.dtype) for role in task.reads}
        derivatives, new = task(read, Numbers(values, step, lr, weight_decay))
        for role, value in to_store(batch, new, tensors, noise_seed(place, step)).items():
            tensors[role].copy_(value)
        return [] if derivatives is None else [task.among_all(derivatives)]

    return function


def _pad(tensor: Tensor, with_zeros: bool) -> Tensor:
    """Return a small tensor with a size from which on torch.compile's kernels for sums do not depend on the size."""
    missing = SMALLEST - tensor.numel()
    if missing <= 0:
        return tensor
    last = tensor[-1:]
    return torch.cat([tensor, (torch.zeros_like(last) if with_zeros else last).expand(missing)])


class _Program:
    """A function cut in three: see :mod:`mada_optim.kernels.traced.trace`.

    ``before`` takes the numbers; ``during`` the tensors, the place of the noise and what ``before`` returned; ``after``
    what ``before`` returned and the sums that ``during`` returned.

    Args:
        function: to be traced.
        tensors: 1-dimensional, all of the same size; the program will take any size from ``SMALLEST``.
        numbers: the function's other arguments; the last, the place of the noise, differs from call to call.
        dtype: of the arithmetic.
    """

    def __init__(self, function: Function, tensors: Tensors, numbers: Sequence[Tensor], dtype: torch.dtype) -> None:
        parts = trace(function, tensors, numbers)
        inputs = [*parts.tensors.values(), parts.place, *parts.carried]
        during = parts.module(inputs, parts.during, parts.sums, dtype)
        self.during = torch.compile(during, dynamic=True, fullgraph=True)
        self.before = on_numbers(parts.module(parts.given, parts.before, parts.carried), numbers[0].device)
        self.after = on_numbers(
            parts.module([*parts.carried, *parts.sums], parts.after, parts.results), numbers[0].device
        )


def on_numbers(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function of numbers, compiled where they are on a GPU: each of some hundred operations would be a launch."""
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True) if device.type != "cpu" else function
    return compiled
