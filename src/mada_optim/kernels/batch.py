"""The parameters that a pass goes over at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor

from mada_optim.families.in_group import FamilyInGroup, Group
from mada_optim.tensors.blocks import Roles
from mada_optim.tensors.distributed import PLAIN, is_dtensor, local, tell_autograd
from mada_optim.tensors.rounding import mix

# Tensors of several parameters by role, in the order of the parameters; see Roles.
Columns = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """Parameters of one group that agree in device, dtypes, and what is to be done.

    They agree in the number of completed steps, too, unless that is on the device and the executor ``counts_each``.

    Args:
        update: the family as their group uses it.
        params: the parameters.
        grads: their gradients; None where they have none.
        states: what is kept for each of them; may be changed.
        buffers: names of what a pass may see of that, where it is there, in one order for all.
        step: number t of steps completed: a number, or a 0-dimensional tensor on the device (``capturable``), that of
            the first parameter; see :attr:`counts`.
        pending: whether the last of them was pending when this step began.
        index: position of the first parameter in its group, from which the noise of stochastic rounding is drawn.
        alike: the same object as in the last step where parameters and gradients are known to be what they were then,
            in all but their values and addresses. None: nothing is known.
        kept: what an executor keeps from step to step, for it to check; no tensors of the batch.
        notes: what an executor has found out about the tensors and needs again in this step.
    """

    update: FamilyInGroup
    params: Sequence[Tensor]
    grads: Sequence[Tensor] | None
    states: Sequence[dict[str, Any]]
    buffers: Sequence[str]
    step: float | Tensor
    pending: bool
    index: int
    alike: object = field(default=None, compare=False)
    kept: dict[str, Any] = field(default_factory=dict, compare=False)
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def group(self) -> Group:
        """The parameter group: learning rate, weight decay, constants."""
        return self.update.group

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
        """The dtype of the arithmetic."""
        return torch.promote_types(self.params[0].dtype.to_real(), torch.float32)

    @property
    def counts(self) -> list[Tensor] | None:
        """The numbers of steps completed where each parameter has its own, on the device; see ``step``."""
        return [state["step"] for state in self.states] if isinstance(self.step, Tensor) else None

    def by_count(self) -> list[Batch]:
        """Batches whose parameters have one number of steps completed."""
        if self.counts is None or len(self.params) == 1:
            return [self]
        return [
            replace(
                self,
                params=[param],
                grads=None if self.grads is None else [self.grads[number]],
                states=[state],
                step=state["step"],
                index=mix(self.index, number),
                alike=None,
                kept={},
                notes={},
            )
            for number, (param, state) in enumerate(zip(self.params, self.states, strict=True))
        ]

    def refresh(self) -> None:
        """Forget what was noted: there are other tensors, or their values have changed."""
        self.notes.clear()
        for name in ("roles", "stored", "columns"):
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
        return [self.roles_of(number) for number in range(len(self.params))]

    @cached_property
    def stored(self) -> Columns | None:
        """For each role the stored tensors of all parameters; None if their roles differ.

        The roles are in one order, in whichever the states of parameters name their tensors. A model may have thousands
        of parameters, so tensors are collected by loops within Python's builtins.
        """
        names = [name for name in self.buffers if name in self.states[0]]
        columns: Columns = {"param": list(self.params)}
        if self.grads is not None:
            columns["grad"] = list(self.grads)
        try:
            columns |= {name: [state[name] for state in self.states] for name in names}
        except KeyError:
            return None
        absent = (name for name in self.buffers if name not in columns)
        return None if any(any(map(contains, self.states, repeat(name))) for name in absent) else columns

    @cached_property
    def columns(self) -> Columns | None:
        """:attr:`roles` transposed: for each role the tensors of all parameters; None if their roles differ."""
        columns = self.stored
        if columns is None:
            return None
        if self.params[0].is_complex() or not all(set(map(type, column)) <= PLAIN for column in columns.values()):
            return {role: [roles[role] for roles in self.roles] for role in columns}
        if any(map(Tensor.is_neg, columns.get("grad", ()))):
            return {**columns, "grad": [grad.resolve_neg() for grad in columns["grad"]]}
        return columns

    def roles_of(self, number: int) -> Roles:
        """One of :attr:`roles`: that of a parameter, by its number in the batch."""
        param, state = self.params[number], self.states[number]
        tensors = {"param": local(param)}
        if self.grads is not None:
            # Autograd may leave a sign or a conjugation for later, of which those who read the memory do not know.
            tensors["grad"] = local(self.grads[number]).resolve_conj().resolve_neg()
        tensors |= {name: local(state[name]) for name in self.buffers if name in state}
        if param.is_complex():
            return {role: torch.view_as_real(tensor) for role, tensor in tensors.items()}
        return tensors
