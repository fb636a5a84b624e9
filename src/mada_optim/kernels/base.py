"""What the engine asks of its kernels, and the batches of parameters that it hands them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mada_optim.families import Family, Shapes
from mada_optim.tensors.blocks import Roles
from mada_optim.tensors.distributed import PLAIN, is_dtensor, local, tell_autograd

# What a parameter keeps beside tensors of its own shape and the family's statistics.
SCALAR_STATE = ("step", "pending")

Group = Mapping[str, Any]
# Stands for a coefficient that is not frozen at a special value.
_ANY_VALUE = torch.zeros((), device="cpu")
# Tensors of several parameters by role, in the order of the parameters; see Roles.
Columns = dict[str, list[Tensor]]


def coefficients_and_constants(family: Family, group: Group, values: Tensor) -> dict[str, Any]:
    """What :meth:`Family.update` takes as ``q``.

    Args:
        family: whose they are.
        group: parameter group with the family's constants and with the special values of frozen coefficients.
        values: all coefficients, shape (K,).
    """
    names = (coefficient.name for coefficient in family.coefficients)
    constants = {name: group[name] for name in family.constants}
    return {**dict(zip(names, values.unbind(), strict=True)), **group["special"], **constants}


def family_buffers(family: Family, group: Group) -> tuple[str, ...]:
    """Names of the family's buffers for parameters of a group.

    They depend on constants and on which coefficients are frozen at special values, not on what the others are now.
    """
    return family.buffers(_of_any_value(family, group))


def family_statistics(family: Family, group: Group) -> Shapes:
    """Names of the family's statistics for parameters of a group, and their shapes; as :func:`family_buffers`."""
    return family.statistics(_of_any_value(family, group))


def _of_any_value(family: Family, group: Group) -> dict[str, Any]:
    """What :meth:`Family.buffers` takes as ``q``."""
    coefficients = dict.fromkeys((coefficient.name for coefficient in family.coefficients), _ANY_VALUE)
    constants = {name: group[name] for name in family.constants}
    return {**coefficients, **group["special"], **constants}


@dataclass(frozen=True)
class Batch:
    """Parameters of one group that agree in device, dtypes, number of completed steps, and what is to be done.

    Args:
        group: parameter group: learning rate, weight decay, constants.
        params: the parameters.
        grads: their gradients; None where they have none.
        states: what is kept for each of them; may be changed.
        buffers: names of what the kernels see of that, where it is there.
        step: number t of steps completed: a number, or a 0-dimensional tensor on the device (``capturable``).
        pending: whether the last of them was pending when this step began.
        index: position of the first parameter in its group, from which the noise of stochastic rounding is drawn.
        found: what kernels have found out about the tensors and need again in this step.
    """

    group: Group
    params: Sequence[Tensor]
    grads: Sequence[Tensor] | None
    states: Sequence[dict[str, Any]]
    buffers: Collection[str]
    step: float | Tensor
    pending: bool
    index: int
    found: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.params[0].device

    @property
    def has_grad(self) -> bool:
        """Whether the parameters have gradients; all or none."""
        return self.grads is not None

    @property
    def dtype(self) -> torch.dtype:
        """In which the arithmetic is done."""
        return torch.promote_types(self.params[0].dtype.to_real(), torch.float32)

    def refresh(self) -> None:
        """Forget what was found: there are other tensors, or their values have changed."""
        self.found.clear()
        for name in ("roles", "columns"):
            self.__dict__.pop(name, None)

    def note_writes(self, names: Iterable[str], through_pointers: Iterable[Tensor] = ()) -> None:
        """Tell autograd what a pass wrote, where autograd cannot see it; torch's operators tell it themselves.

        A graph that still needs an overwritten value then raises an error when it is differentiated.

        Args:
            names: of the tensors written: "param" and buffers. Kernels write to the local parts of DTensors.
            through_pointers: what was written by kernels that are not torch's.
        """
        torch.autograd.graph.increment_version(through_pointers)
        if is_dtensor(self.params[0]):
            stored = ({"param": param, **state} for param, state in zip(self.params, self.states, strict=True))
            tell_autograd(tensors[name] for tensors in stored for name in names if name in tensors)

    @cached_property
    def roles(self) -> list[Roles]:
        """For each parameter its tensors by name: "param", "grad" and the buffers. Complex ones as pairs of reals.

        Of a tensor that is spread over processes it is the part on this one. All but the gradient are the stored ones.
        """
        grads: Sequence[Tensor | None] = self.grads or [None] * len(self.params)
        return [self._roles(*row) for row in zip(self.params, grads, self.states, strict=True)]

    @cached_property
    def columns(self) -> Columns | None:
        """:attr:`roles` transposed: for each role the tensors of all parameters; None if their roles differ.

        A model may have thousands of parameters, so plain tensors are collected by loops within Python's builtins.
        """
        names = self.states[0].keys()
        if any(state.keys() != names for state in self.states):
            return None
        columns: Columns = {"param": list(self.params)}
        if self.grads is not None:
            columns["grad"] = list(self.grads)
        columns |= {name: [state[name] for state in self.states] for name in names if name in self.buffers}
        if self.params[0].is_complex() or not all(set(map(type, column)) <= PLAIN for column in columns.values()):
            return {role: [roles[role] for roles in self.roles] for role in columns}
        if any(map(Tensor.is_neg, columns.get("grad", ()))):
            columns["grad"] = [grad.resolve_neg() for grad in columns["grad"]]
        return columns

    def _roles(self, param: Tensor, grad: Tensor | None, state: Mapping[str, Any]) -> Roles:
        tensors = {"param": local(param)}
        if grad is not None:
            # Autograd may leave a sign or a conjugation for later, of which those who read the memory do not know.
            tensors["grad"] = local(grad).resolve_conj().resolve_neg()
        for name, value in state.items():
            if name in self.buffers:
                tensors[name] = local(value)
        if param.is_complex():
            return {role: torch.view_as_real(tensor) for role, tensor in tensors.items()}
        return tensors


class Kernels(ABC):
    """The two passes of a step over the parameters of a batch. Everything is changed in place."""

    @staticmethod
    def run_on_numbers(function: Callable[..., None], *tensors: Tensor) -> None:
        """Call a function of a few numbers that changes some of them in place."""
        function(*tensors)

    @abstractmethod
    def settle(self, batch: Batch, values: Tensor, learned: Sequence[str], keep: bool) -> Tensor | None:
        """Complete the pending step t: differentiate it if the next gradient is there, and advance the buffers.

        Args:
            batch: parameters whose state holds the buffers before step t, and g_t as ``pending_grad``.
            values: coefficients of step t, shape (K,), in the precision of their device.
            learned: names of those to differentiate by.
            keep: what :meth:`step` will be told, if the parameters have gradients.

        Returns:
            ⟨g_{t+1}, ∂Δ_t/∂q⟩ for all K coefficients, 0 where not learned, with ``values``' dtype and device. None if
            there is no gradient or nothing to learn.
        """

    @abstractmethod
    def step(self, batch: Batch, values: Tensor, keep: bool) -> None:
        """Take step t+1 of the parameters.

        Args:
            batch: parameters that have a gradient g_{t+1}.
            values: coefficients of this step.
            keep: leave the buffers as they are before the step and store the gradient in ``pending_grad``.
        """
