"""A family as a parameter group uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mada_optim.families.base import Family, Shapes

Group = Mapping[str, Any]
# Stands for a coefficient that is not frozen where it leaves out a part of the update.
_ANY_VALUE = torch.zeros((), device="cpu")


@dataclass(frozen=True, eq=False)
class FamilyInGroup:
    """A family with the constants of one parameter group, and with the coefficients that are frozen in it.

    Make one for each step: the group may change between steps.

    Args:
        family: the update rule.
        group: the parameter group, as :class:`HypergradientOptimizer` keeps it.
    """

    family: Family
    group: Group

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The family's constants in this group."""
        return {name: self.group[name] for name in self.family.constants}

    @cached_property
    def fixed(self) -> str:
        """All of the group that is fixed where an update is compiled: text, since what users wrote may change."""
        options = {name: self.group[name] for name in ("special", "maximize", "stochastic_rounding")}
        return repr({**self.constants, **options})

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that the update reads and writes.

        They depend on constants and on which coefficients are frozen where, not on what the others are now.
        """
        return self.family.buffers(self._arguments_of_any_value)

    @cached_property
    def statistics(self) -> Shapes:
        """Names of the family's statistics, and how their shapes follow from the parameter's; as :attr:`buffers`."""
        return self.family.statistics(self._arguments_of_any_value)

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """Names of the learned coefficients by which a step of the group's parameters is to be differentiated."""
        step_sizes = self.group["hyper_lr"]
        learned = [coefficient.name for coefficient in self.family.coefficients if step_sizes[coefficient.name] > 0.0]
        if not learned:
            return ()
        idle = self.family.idle(self.constants)
        return tuple(name for name in learned if name not in idle)

    def arguments(self, values: Tensor) -> dict[str, Any]:
        """What :meth:`Family.update` takes as ``q``.

        Args:
            values: all coefficients, shape (K,).
        """
        names = (coefficient.name for coefficient in self.family.coefficients)
        return {**dict(zip(names, values.unbind(), strict=True)), **self.group["special"], **self.constants}

    @cached_property
    def _arguments_of_any_value(self) -> dict[str, Any]:
        """What :meth:`Family.buffers` takes as ``q``."""
        coefficients = dict.fromkeys((coefficient.name for coefficient in self.family.coefficients), _ANY_VALUE)
        return {**coefficients, **self.group["special"], **self.constants}
