"""The families of MADA and OMADA on the CPU: calls ``native.cpp``, see :mod:`mada_optim.kernels.native.library`."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor
from mada_optim.kernels.native.layout import ADVANCED, BUFFERS, COEFFICIENTS
from mada_optim.kernels.native.library import Variant, load, why_unavailable
from mada_optim.kernels.passes import CompleteAndTake, CompletePending, Pass
from mada_optim.tensors.blocks import Roles
from mada_optim.tensors.rounding import mix

_TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}
_ROLES = ("param", "grad", *BUFFERS)
_WRITTEN = ("param", "pending_grad", *ADVANCED)
# Places of the numbers of a Row, all of 64 bits.
_PLACES = {name: place for place, name in enumerate(("numel", "seed", *_ROLES))}
_WIDTH = len(_PLACES)


class _Settings(ctypes.Structure):
    """native.cpp's Settings."""

    _fields_ = (
        *((name, ctypes.c_double) for name in COEFFICIENTS),
        *((name, ctypes.c_double) for name in ("eps", "kappa1", "kappa2", "t", "lr", "weight_decay")),
        *((name, ctypes.c_int32) for name in ("maximize", "keep", "stored", "threads")),
    )


class NativeExecutor(Executor):
    """MADA's family in closed form.

    Args:
        otherwise: what carries out passes over parameters that are not dense in memory.
    """

    def __init__(self, otherwise: Executor) -> None:
        self._otherwise = otherwise

    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """See :meth:`Executor.run`."""
        rows, rest = _split(batch)
        total = self._otherwise.run(task, rest, values) if rest else None
        if rows is None:
            return total
        derivatives = _run(task, batch, values, rows)
        stored_as_previous = isinstance(task, CompletePending) or (isinstance(task, CompleteAndTake) and task.keep)
        if rows.variant.DIFF and stored_as_previous:
            rows.exchange("previous_grad", "pending_grad")
            batch.refresh()
            batch.notes["split"] = rows, rest
        if derivatives is not None:
            total = derivatives if total is None else total + derivatives
        return total


def _run(task: Pass, batch: Batch, values: Tensor, rows: _Rows) -> Tensor | None:
    """Carry out a pass; see :meth:`Executor.run`."""
    library, step = load(rows.variant), batch.step + 1 if task.later else batch.step
    sums = (ctypes.c_double * len(COEFFICIENTS))()
    of_rows = rows.at(step), len(rows)
    if isinstance(task, CompleteAndTake):
        before, values = values.chunk(2)
        pending = _settings(batch, before, batch.step, task.keep, rows.variant)
        settings = _settings(batch, values, step, task.keep, rows.variant)
        library.mada_complete_and_step(ctypes.byref(pending), ctypes.byref(settings), *of_rows, sums)
    else:
        settings = _settings(batch, values, step, task.keep, rows.variant)
        if not isinstance(task, CompletePending):
            library.mada_step(ctypes.byref(settings), *of_rows)
        elif task.learned:
            library.mada_complete(ctypes.byref(settings), *of_rows, sums)
        else:
            library.mada_advance(ctypes.byref(settings), *of_rows)
    written = [role for role in task.writes if role in _WRITTEN]
    batch.note_writes(written, rows.tensors(written))
    if not task.learned:
        return None
    by_name = dict(zip(COEFFICIENTS, sums, strict=True))
    names = (coefficient.name for coefficient in batch.update.family.coefficients)
    among_all = [by_name[name] if name in task.learned else 0.0 for name in names]
    return torch.tensor(among_all, dtype=values.dtype, device=values.device)


def _split(batch: Batch) -> tuple[_Rows | None, Batch | None]:
    """The parameters that a library can work on, and the others."""
    if "split" not in batch.notes:
        batch.notes["split"] = _find_split(batch)
    return batch.notes["split"]  # type: ignore[no-any-return]


def _find_split(batch: Batch) -> tuple[_Rows | None, Batch | None]:
    native, rest = batch, None
    columns: Mapping[str, Sequence[Any]] | None = batch.columns
    if columns is None or not _are_dense(columns):
        dense = [_is_dense(roles) for roles in batch.roles]
        dtypes = [_state_dtype(roles) for roles in batch.roles]
        first = next(compress(dtypes, dense), None)
        flags = [flag and dtype == first for flag, dtype in zip(dense, dtypes, strict=True)]
        part, rest = (_part(batch, [flag == wanted for flag in flags]) for wanted in (True, False))
        if part is None:
            return None, rest
        native = part
        columns = {role: [roles.get(role) for roles in native.roles] for role in _ROLES}
    # A null pointer would crash the process. Of states that are alike, one is looked at.
    seen = {name: column[:1] if columns is batch.columns else column for name, column in columns.items()}
    for name in batch.update.buffers:
        if name in BUFFERS and any(tensor is None for tensor in seen.get(name, [None])):
            raise KeyError(f"{name} is missing in the state of a parameter: load a whole state_dict")
    variant = _variant(batch, columns)
    if why_unavailable(variant) is not None:
        return None, replace(batch, notes={})  # not itself, which it would keep alive, and the gradients
    return _Rows(variant, columns, native.states, batch.index), rest


def _settings(batch: Batch, values: Tensor, t: float | Tensor, keep: bool, variant: Variant) -> _Settings:
    group, constants = batch.group, batch.update.constants
    names = (coefficient.name for coefficient in batch.update.family.coefficients)
    numbers = dict(zip(names, values.tolist(), strict=True))
    return _Settings(
        *(numbers.get(name, 0.0) for name in COEFFICIENTS),
        constants["eps"],
        *constants["lion_betas"],
        float(t),
        float(group["lr"]),
        group["weight_decay"],
        group["maximize"],
        keep,
        # With differences of gradients, mada_complete() stores the gradient where that costs least.
        batch.pending and variant.DIFF,
        torch.get_num_threads(),
    )


def _variant(batch: Batch, columns: Mapping[str, Sequence[Any]]) -> Variant:
    names = batch.update.buffers
    first = {role: column[0] for role, column in columns.items()}
    return Variant(
        ADAPTIVE="exp_avg" in names,
        SIGN="lion_exp_avg" in names,
        MEAN="mean_exp_avg_sq" in names,
        DIFF="exp_avg_diff" in names,
        YOGI="exp_avg" in names and "c" not in batch.group["special"],
        ORTHO="ortho" in names,
        ROWS="ortho_normalized" in names,
        PARAM=_TYPES[first["param"].dtype],
        GRAD=_TYPES[(first["param"] if first.get("grad") is None else first["grad"]).dtype],
        STATE=_TYPES[_state_dtype(first)],  # type: ignore[index]
        REAL=_TYPES[batch.dtype],
        STOCHASTIC=batch.group["stochastic_rounding"],
    )


def _part(batch: Batch, wanted: Sequence[bool]) -> Batch | None:
    """The parameters of a batch that are wanted; None where there are none."""
    if not any(wanted):
        return None
    params, states = list(compress(batch.params, wanted)), list(compress(batch.states, wanted))
    grads = None if batch.grads is None else list(compress(batch.grads, wanted))
    return replace(batch, params=params, grads=grads, states=states, notes={})


class _Rows:
    """The parameters that a library works on, as native.cpp's Row.

    Args:
        variant: what the library is compiled for.
        columns: their tensors by role; None for what a parameter does not have.
        states: what is kept for each of them.
        index: of the batch that they belong to.
    """

    def __init__(
        self,
        variant: Variant,
        columns: Mapping[str, Sequence[Any]],
        states: Sequence[dict[str, Any]],
        index: int,
    ) -> None:
        self.variant = variant
        self._columns, self._states, self._index = dict(columns), states, index
        if self._columns.get("grad"):
            self._columns["grad"] = list(map(_laid_out_like, columns["grad"], columns["param"]))
        self._table = array("q", bytes(_WIDTH * array("q").itemsize * len(states)))
        self._fill("numel", [param.numel() for param in self._columns["param"]])
        for role in _ROLES:
            if role in self._columns:
                tensors = self._columns[role]
                self._fill(role, [0 if tensor is None else tensor.data_ptr() for tensor in tensors])

    def __len__(self) -> int:
        return len(self._states)

    def at(self, step: float | Tensor) -> ctypes.c_void_p:
        """Return where the rows are in memory, valid until the next call. ``step`` tells the noise."""
        if "bfloat16" in (self.variant.PARAM, self.variant.STATE):
            self._fill("seed", [mix(self._index, number, int(step)) for number in range(len(self))])
        return ctypes.c_void_p(self._table.buffer_info()[0])

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Return the tensors with these names, of all parameters that have them."""
        return [tensor for name in names for tensor in self._columns.get(name, ()) if tensor is not None]

    def exchange(self, one: str, other: str) -> None:
        """Exchange two buffers of all parameters."""
        for state in self._states:
            state[one], state[other] = state[other], state[one]
        columns, table, first, second = self._columns, self._table, _PLACES[one], _PLACES[other]
        columns[one], columns[other] = columns[other], columns[one]
        table[first::_WIDTH], table[second::_WIDTH] = table[second::_WIDTH], table[first::_WIDTH]

    def _fill(self, name: str, numbers: list[int]) -> None:
        self._table[_PLACES[name] :: _WIDTH] = array("q", numbers)


def _laid_out_like(grad: Tensor | None, param: Tensor) -> Tensor | None:
    """A gradient with its elements in memory as the parameter's: gradients may come in a layout of their own."""
    if grad is None or (grad.is_contiguous() and param.is_contiguous()) or grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _are_dense(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether all parameters are contiguous and :func:`_is_dense`, and their buffers have one dtype.

    It is asked by loops within Python's builtins. They keep no shapes: Python's garbage collector would look at each.
    """
    shapes = zip(*(map(Tensor.size, column) for column in columns.values()), strict=True)
    buffers = [tensor for role, column in columns.items() if role in BUFFERS for tensor in column]
    return (
        all(alike.count(alike[0]) == len(alike) for alike in shapes)
        and all(map(Tensor.is_contiguous, columns["param"]))
        and all(map(Tensor.is_contiguous, buffers))
        and not any(map(Tensor.is_neg, columns["param"]))
        and len({tensor.dtype for tensor in buffers}) == 1
        and {tensor.is_cpu for tensor in buffers} == {True}
    )


def _state_dtype(tensors: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of the buffers of one parameter."""
    return next((tensor.dtype for role, tensor in tensors.items() if role in BUFFERS and tensor is not None), None)


def _is_dense(roles: Roles) -> bool:
    """Whether parameter and buffers are the same elements in the same order in memory, without gaps.

    Raises:
        RuntimeError: one of them has another shape than the parameter, whose memory must not be touched then.
    """
    param = roles["param"]
    if param.is_neg():  # its memory holds the opposite
        return False
    for role, tensor in roles.items():
        if tensor.shape != param.shape:
            raise RuntimeError(f"{role} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}")
    buffers = [tensor for role, tensor in roles.items() if role in BUFFERS]
    if any(tensor.dtype != buffers[0].dtype or tensor.device != param.device for tensor in buffers):
        return False
    if param.is_contiguous():
        return all(tensor.is_contiguous() for tensor in buffers)
    if any(tensor.stride() != param.stride() for tensor in buffers):
        return False
    expected = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
