"""What is kept for a parameter: its names, how it begins, and when it is let go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import contains, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from mada_optim.families.in_group import FamilyInGroup
from mada_optim.tensors.devices import has_float64
from mada_optim.tensors.distributed import check_learnable, check_placements, replicate_like

State = MutableMapping[Tensor, dict[str, Any]]
# What a parameter keeps, together, only while something is learned, or until the step after that has changed.
PENDING = ("pending", "pending_grad")
# Names in a parameter's state that are not the family's.
_TAKEN = ("param", "grad", "step", *PENDING)


@dataclass(frozen=True)
class Members:
    """The parameters of a group as a step finds them.

    Args:
        update: the family as the group uses it.
        params: the parameters.
        grads: their gradients; None for those that have none.
        states: what is kept for each of them; empty for those without.
    """

    update: FamilyInGroup
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    states: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, update: FamilyInGroup, state: State, grads: Sequence[Tensor | None] | None = None) -> Members:
        """Those of the group of ``update``, with the gradients that they have if no others are given."""
        params: list[Tensor] = update.group["params"]
        grads = [param.grad for param in params] if grads is None else grads
        if len(state) == len(params) and all(map(is_, state, params)):  # to find each of them takes longer
            return cls(update, params, grads, list(state.values()))
        return cls(update, params, grads, list(map(state.get, params, repeat(_NOTHING))))


_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class ParameterState:
    """What each parameter of a group keeps.

    Args:
        update: the family as the group uses it.
    """

    update: FamilyInGroup

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of its own shape that each parameter keeps."""
        names = self.update.buffers
        return (*names, "pending_grad") if self.update.learned else names

    def check_names(self) -> None:
        """Raise ValueError where a buffer of the family would have the name of something else."""
        names = [*self.update.buffers, *self.update.statistics]
        for name in names:
            if name in _TAKEN or names.count(name) > 1:
                raise ValueError(f"family: {self.update.family.name} has a buffer {name!r}, a name that is taken")

    def prepare(self, state: State, grads: Sequence[Tensor | None]) -> Members:
        """Give parameters that have a gradient the state that they need, and return what the group's parameters have.

        That is all of it before their first step, and later what coefficients need that were not learned until now.

        Args:
            state: of the optimizer. Changed.
            grads: of the group's parameters.
        """
        members = Members.of(self.update, state, grads)
        needed = ("step", *self.tensors, *self.update.statistics)
        if _have_all(members.states, needed):
            return members
        incomplete = [
            param
            for param, grad, kept in zip(members.params, grads, members.states, strict=True)
            if grad is not None and not set(needed) <= kept.keys()
        ]
        if incomplete and any(step_size > 0.0 for step_size in self.update.group["hyper_lr"].values()):
            check_learnable(incomplete)
        for param in incomplete:
            kept = state.get(param) or {}
            if not kept:
                # Libraries put other parameters into the place of those given.
                check_placements(param, self.update.family.elementwise)
            state[param] = {**self.initial(param), **kept}
        return Members.of(self.update, state, grads) if incomplete else members

    def repeats(self, state: State, grads: Sequence[Tensor | None]) -> bool:
        """Whether a step with such gradients leaves all that the program knows of the state as it finds it.

        Args:
            state: of the optimizer.
            grads: of the group's parameters.
        """
        group, learned = self.update.group, bool(self.update.learned)
        if group.get("betas") != group.get("previous_betas"):
            return False
        needed = {"step", *self.tensors, *self.update.statistics}
        for param, grad in zip(group["params"], grads, strict=True):
            kept = state.get(param, _NOTHING)
            is_pending = "pending" in kept and bool(kept["pending"])
            if is_pending != (learned and grad is not None) or not (grad is None or needed <= kept.keys()):
                return False
        return True

    def initial(self, param: Tensor, names: Sequence[str] | None = None) -> dict[str, Any]:
        """State of a parameter before its first step.

        Args:
            param: the parameter.
            names: of its buffers; None: those that the group's coefficients need.
        """
        group = self.update.group
        if names is None:
            names = self.tensors
        exact = torch.promote_types(param.dtype.to_real(), torch.float32)
        real = group["state_dtype"] or exact
        dtype = real.to_complex() if param.is_complex() else real
        device = param.device if group["capturable"] else torch.device("cpu")
        # As torch.optim counts.
        wide = torch.get_default_dtype() == torch.float64 and has_float64(device)
        counted = torch.float64 if wide else torch.float32
        state: dict[str, Any] = {"step": torch.zeros((), dtype=counted, device=device)}
        if "pending_grad" in names:
            state["pending"] = torch.zeros((), dtype=torch.bool, device="cpu")
        for name in names:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name, shape in self.update.statistics.items():
            statistic = torch.zeros(tuple(shape(param.shape)), dtype=exact, device=param.device)
            state[name] = replicate_like(statistic, param)
        return state


def _have_all(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bool:
    """Whether all states have all of at least two names."""
    try:
        deque(map(itemgetter(*names), states), maxlen=0)
    except KeyError:
        return False
    return True


def note_pending(states: Iterable[dict[str, Any]], pending: bool) -> None:
    """Note in the states of parameters whether their last step is pending."""
    for state in states:
        if "pending" in state:
            state["pending"].fill_(pending)
            if not pending:
                state["pending_grad"].zero_()  # else what is there would depend on the executor


def drop_pending(states: Sequence[dict[str, Any]]) -> None:
    """Drop what only learning needs."""
    for name in PENDING:
        for state in compress(states, list(map(contains, states, repeat(name)))):
            del state[name]


def count_steps(states: Iterable[dict[str, Any]]) -> None:
    """Count a step of parameters of one group, which have these states."""
    counts = [state["step"] for state in states]
    if counts and counts[0].is_cpu:
        # By far the fastest way to count on the host.
        torch._foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)
    elif counts:
        torch._foreach_add_(counts, 1)
