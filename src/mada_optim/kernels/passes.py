"""The passes of a step over the parameters, written once.

The hypergradient of step t needs the buffers before that step, g_t and g_{t+1}. So where one is due, step t is left
*pending*: its buffers wait, and g_t is kept. Step t+1 then makes two passes: :class:`CompletePending` differentiates
step t and advances its buffers; between the passes the coefficients move; :class:`TakeStep` moves the parameters. Where
the coefficients of step t+1 do not wait for that hypergradient, :class:`CompleteAndTake` does both in one pass.

A pass is a pure function of tensors and numbers. Executors decide on which tensors it is called, how it is compiled,
and how its results are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mada_optim.families.in_group import FamilyInGroup
from mada_optim.learning.hypergradient import align_and_advance

# By role: "param", "grad", "pending_grad" and the family's buffers.
Tensors = Mapping[str, Tensor]


class Numbers(NamedTuple):
    """What a pass needs beside tensors.

    Args:
        values: all coefficients, shape (K,); for both steps those of step t and then those of step t+1, shape (2 K,).
        step: of the step that is completed or taken, for both t+1; a 0-dimensional tensor.
        lr, weight_decay: η and λ: numbers, or 0-dimensional tensors.
    """

    values: Tensor
    step: Tensor
    lr: float | Tensor
    weight_decay: float | Tensor


@dataclass(frozen=True, eq=False)
class Pass(ABC):
    """One pass over the parameters of a batch.

    Args:
        update: the family as the parameter group uses it.
        keep: whether the step that is taken next, or by this pass, is left pending.
    """

    update: FamilyInGroup
    keep: bool

    later: ClassVar[bool]
    """Whether it needs the numbers of the step that is taken, t+1, and not of the one that is completed, t."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Roles of the tensors that it needs."""

    @property
    @abstractmethod
    def writes(self) -> tuple[str, ...]:
        """Roles of the tensors that it may return."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the coefficients by which it differentiates."""
        return ()

    @property
    def key(self) -> Hashable:
        """All that is fixed where the pass is compiled."""
        return type(self), self.update.family, self.keep, self.learned, self.reads, self.update.fixed

    @abstractmethod
    def __call__(self, tensors: Tensors, numbers: Numbers) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the pass.

        Args:
            tensors: those that it reads, in the precision of the arithmetic, all of one shape.
            numbers: as on the tensors' device.

        Returns:
            ⟨g_{t+1}, ∂Δ_t/∂q⟩ summed over all elements, shape (len(learned),), or None where nothing is differentiated.
            And new values by role.
        """

    def among_all(self, derivatives: Tensor) -> Tensor:
        """Derivatives by ``learned``, put into their places among all K coefficients."""
        by_name = dict(zip(self.learned, derivatives.unbind(), strict=True))
        zero = torch.zeros_like(derivatives[0])
        return torch.stack([by_name.get(coefficient.name, zero) for coefficient in self.update.family.coefficients])

    def _downhill(self, grad: Tensor) -> Tensor:
        """The gradient of what is minimized."""
        return -grad if self.update.group["maximize"] else grad


@dataclass(frozen=True, eq=False)
class CompletePending(Pass):
    """Complete the pending step t: differentiate it by the learned coefficients, and advance the buffers.

    Args:
        has_grad: whether the parameters have the next gradient, without which nothing is differentiated.
    """

    has_grad: bool
    later: ClassVar[bool] = False

    @cached_property
    def learned(self) -> tuple[str, ...]:
        return self.update.learned if self.has_grad else ()

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return ("grad", "pending_grad", *self.writes) if self.learned else ("pending_grad", *self.writes)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return self.update.buffers

    def __call__(self, tensors: Tensors, numbers: Numbers) -> tuple[Tensor | None, dict[str, Tensor]]:
        family, q = self.update.family, self.update.arguments(numbers.values)
        state, grad = {name: tensors[name] for name in self.writes}, tensors["pending_grad"]
        if not self.learned:
            return None, family.update(state, grad, q, numbers.step)[1]
        next_grad = self._downhill(tensors["grad"])
        return align_and_advance(family, state, grad, next_grad, q, self.learned, numbers.step)


@dataclass(frozen=True, eq=False)
class TakeStep(Pass):
    """Take step t+1 of the parameters: x ← (1 - ηλ) x - η Δ. The buffers advance, or the gradient is kept instead."""

    later: ClassVar[bool] = True

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return ("param", "grad", *self.update.buffers)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return ("param", *(("pending_grad",) if self.keep else self.update.buffers))

    def __call__(self, tensors: Tensors, numbers: Numbers) -> tuple[Tensor | None, dict[str, Tensor]]:
        q, grad = self.update.arguments(numbers.values), self._downhill(tensors["grad"])
        state = {name: tensors[name] for name in self.update.buffers}
        direction, advanced = self.update.family.update(state, grad, q, numbers.step)
        param = tensors["param"] * (1 - numbers.lr * numbers.weight_decay) - numbers.lr * direction
        return None, {"param": param, **({"pending_grad": grad} if self.keep else advanced)}


@dataclass(frozen=True, eq=False)
class CompleteAndTake(Pass):
    """Complete the pending step t and take step t+1: one after the other for each element, in one pass over memory."""

    later: ClassVar[bool] = True

    @cached_property
    def learned(self) -> tuple[str, ...]:
        return self._complete.learned

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._complete.reads, *self._take.reads)))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._complete.writes, *self._take.writes)))

    def __call__(self, tensors: Tensors, numbers: Numbers) -> tuple[Tensor | None, dict[str, Tensor]]:
        values = numbers.values.unbind()  # so that kernels of numbers can be written, which know no slices
        half = len(values) // 2
        before, now = torch.stack(values[:half]), torch.stack(values[half:])
        derivatives, advanced = self._complete(tensors, numbers._replace(values=before, step=numbers.step - 1))
        _, taken = self._take({**tensors, **advanced}, numbers._replace(values=now))
        return derivatives, {**advanced, **taken}

    @cached_property
    def _complete(self) -> CompletePending:
        return CompletePending(self.update, self.keep, has_grad=True)

    @cached_property
    def _take(self) -> TakeStep:
        return TakeStep(self.update, self.keep)
