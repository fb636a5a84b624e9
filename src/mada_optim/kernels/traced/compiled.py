"""Any elementwise family, turned into fused kernels by torch.compile: its own update and the derivative of that.

Each function is cut in three first, see :mod:`mada_optim.kernels.traced.trace`. Its elementwise part is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.families import Family
from mada_optim.kernels.base import Batch
from mada_optim.kernels.eager import PlainKernels, spread, to_store
from mada_optim.kernels.traced.trace import Pass, Tensors, trace
from mada_optim.learning.hypergradient import align_and_advance
from mada_optim.tensors.blocks import make_blocks
from mada_optim.tensors.devices import move_numbers, number_on
from mada_optim.tensors.rounding import noise_seed

SMALLEST = 1 << 13


class CompiledKernels(PlainKernels):
    """Fused by torch.compile. Large tensors are handed over one by one, small ones put together.

    A function is compiled anew only for other dtypes, constants, or sets of learned coefficients.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._programs: dict[Any, _Program] = {}

    def settle(self, batch: Batch, values: Tensor, learned: Sequence[str], keep: bool) -> Tensor | None:  # noqa: ARG002
        """See :meth:`Kernels.settle`."""
        learned = [name for name in learned if batch.has_grad]
        names = self.family.buffers(self._q(batch, values))
        read = ("grad", "pending_grad", *names) if learned else ("pending_grad", *names)
        results = self._run(batch, values, batch.step, self._settle(batch, learned), read, names)
        return move_numbers(results[0], values.device) if results else None  # none where no parameter has an element

    def step(self, batch: Batch, values: Tensor, keep: bool) -> None:
        """See :meth:`Kernels.step`."""
        names = self.family.buffers(self._q(batch, values))
        kept = ("pending_grad",) if keep else names
        read = dict.fromkeys(("param", "grad", *names, *kept))
        self._run(batch, values, batch.step + 1, self._step(batch, keep), tuple(read), ("param", *kept))

    # What is compiled.

    def _settle(self, batch: Batch, learned: Sequence[str]) -> Pass:
        def settle(tensors: Tensors, values: Tensor, t: Tensor, *others: Tensor) -> list[Tensor]:
            q, state = self._read(batch, tensors, values)
            grad, found = tensors["pending_grad"].to(batch.dtype), []
            if learned:
                next_grad = self._oriented(batch, tensors["grad"])
                aligned, advanced = align_and_advance(self.family, state, grad, next_grad, q, learned, t)
                found.append(spread(self.family, learned, aligned))
            else:
                _, advanced = self.family.update(state, grad, q, t)
            self._store(batch, tensors, advanced, seed=others[-1])
            return found

        return settle

    def _step(self, batch: Batch, keep: bool) -> Pass:
        def step(
            tensors: Tensors, values: Tensor, t: Tensor, lr: Tensor, weight_decay: Tensor, seed: Tensor
        ) -> list[Tensor]:
            q, state = self._read(batch, tensors, values)
            grad = self._oriented(batch, tensors["grad"])
            direction, advanced = self.family.update(state, grad, q, t)
            shrunk = 1 - lr * weight_decay
            param = tensors["param"].to(batch.dtype) * shrunk - lr * direction
            self._store(batch, tensors, {"param": param, **({"pending_grad": grad} if keep else advanced)}, seed)
            return []

        return step

    def _read(self, batch: Batch, tensors: Tensors, values: Tensor) -> tuple[dict[str, Any], Tensors]:
        q = self._q(batch, values)
        return q, {name: tensors[name].to(batch.dtype) for name in self.family.buffers(q)}

    @staticmethod
    def _oriented(batch: Batch, grad: Tensor) -> Tensor:
        return -grad.to(batch.dtype) if batch.group["maximize"] else grad.to(batch.dtype)

    def _store(self, batch: Batch, tensors: Tensors, values: Mapping[str, Tensor], seed: Tensor) -> None:
        for name, value in to_store(self.family, batch, values, tensors, seed).items():
            tensors[name].copy_(value)

    # How it is run.

    def _run(
        self,
        batch: Batch,
        values: Tensor,
        step: float | Tensor,
        function: Pass,
        read: Sequence[str],
        written: Sequence[str],
    ) -> list[Tensor]:
        """Apply a function to all parameters of a batch; its results are added up."""
        numbers = [
            move_numbers(values, batch.device),
            *(number_on(x, batch.device) for x in (step, batch.group["lr"], batch.group["weight_decay"])),
        ]
        program: _Program | None = None
        scalars: list[Tensor] = []
        totals: list[Tensor] = []
        for number, block in enumerate(make_blocks(batch.roles, elementwise=True, cut=False)):
            shared = {role: block.flat(role) for role in read}
            # An element that a zero gradient follows adds nothing to the hypergradient.
            tensors = {role: _pad(tensor.detach(), role == "grad") for role, (tensor, _) in shared.items()}
            seed = noise_seed(step, batch.index, number)
            if not isinstance(seed, Tensor):
                seed = torch.full((), seed, dtype=torch.int64, device=batch.device)
            if program is None:
                program = self._program(batch, function, tensors, [*numbers, seed])
                scalars = program.before(*numbers)
            sums = program.during(*tensors.values(), seed, *scalars)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            for role in written:
                tensor, in_place = shared[role]
                if not in_place or tensor.numel() < SMALLEST:
                    block.write_flat(role, tensors[role][: tensor.numel()])
        batch.note_writes(written)
        return [] if program is None else program.after(*scalars, *totals)

    def _key(self, batch: Batch, function: Pass) -> tuple[Any, ...]:
        """All that is compiled in, but for the dtypes of the tensors."""
        group = batch.group
        baked = {name: group[name] for name in (*self.family.constants, "special", "maximize", "stochastic_rounding")}
        learned = tuple(name for name, alpha in group["hyper_lr"].items() if alpha > 0.0)
        return function.__name__, repr(baked), learned, batch.has_grad, batch.dtype, batch.device

    def _program(self, batch: Batch, function: Pass, tensors: Tensors, numbers: list[Tensor]) -> _Program:
        key = (*self._key(batch, function), tuple((role, tensor.dtype) for role, tensor in tensors.items()))
        if key not in self._programs:
            self._programs[key] = _Program(function, tensors, numbers, batch.dtype)
        return self._programs[key]


def _pad(tensor: Tensor, with_zeros: bool) -> Tensor:
    """Small tensors get to a size from which on torch.compile's kernels for sums do not depend on the size."""
    missing = SMALLEST - tensor.numel()
    if missing <= 0:
        return tensor
    last = tensor[-1:]
    return torch.cat([tensor, (torch.zeros_like(last) if with_zeros else last).expand(missing)])


class _Program:
    """A function cut in three: see :mod:`mada_optim.kernels.traced.trace`.

    ``before`` takes the numbers; ``during`` the tensors, the seed and what ``before`` returned; ``after`` what
    ``before`` returned and the sums that ``during`` returned.

    Args:
        function: to be traced.
        tensors: 1-dimensional, all of the same size; the program will take any size from ``SMALLEST``.
        numbers: the function's other arguments; the last, the seed, differs from call to call.
        dtype: of the arithmetic.
    """

    def __init__(self, function: Pass, tensors: Tensors, numbers: Sequence[Tensor], dtype: torch.dtype) -> None:
        parts = trace(function, tensors, numbers)
        inputs = [*parts.tensors.values(), parts.seed, *parts.carried]
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
