"""The coefficients that parameter groups share, and how they are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mada_optim.engine.betas import group_values, take_up_betas
from mada_optim.families import Family
from mada_optim.learning.rule import LearnedTensors, LearningRule
from mada_optim.tensors.devices import device_of, has_values, move_numbers, number_on
from mada_optim.tensors.distributed import Team

Group = dict[str, Any]

# What all parameter groups have in common unless each has coefficients of its own.
SET_SETTINGS = ("hyper_lr", "bounds", "hyper_momentum", "hyper_clip", "hyper_warmup", "hyper_every", "hyper_delay")
# What learning changes, and all that a set of coefficients keeps, in the parameter groups that share it.
LEARNED_TENSORS = ("coefficients", "hyper_momentum_buffer", "hyper_square_buffer", "hyper_taken")
SET_TENSORS = (*LEARNED_TENSORS, "hyper_skipped", "hyper_steps", "hyper_waiting")
# Where each group keeps the learning rate of its last step.
PREVIOUS_LR = "previous_lr"


def learning_rule(group: Group) -> LearningRule:
    """The rule that a parameter group's settings describe; raises ValueError where they make no sense."""
    return LearningRule(*(group[f"hyper_{name}"] for name in ("momentum", "clip", "warmup", "every", "delay")))


def new_tensors(values: Sequence[float], dtype: torch.dtype, device: torch.device, capturable: bool) -> Group:
    """What a set of coefficients keeps, before the first step.

    Args:
        values: of all coefficients.
        dtype, device: in and on which the coefficients are.
        capturable: whether the count of steps is on the device, too.
    """
    coefficients = torch.tensor(values, dtype=dtype, device=device)
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("hyper_taken", "hyper_skipped")}
    return {
        "coefficients": coefficients,
        "hyper_momentum_buffer": torch.zeros_like(coefficients),
        "hyper_square_buffer": torch.zeros_like(coefficients),
        **counts,
        "hyper_steps": torch.zeros((), dtype=torch.int64, device=device if capturable else "cpu"),
        # With a delay: the last hypergradient, and after how many steps it is to be used; 0: not at all.
        "hyper_waiting": coefficients.new_zeros(len(values) + 1),
    }


class CoefficientSet:
    """The coefficients that parameter groups share.

    Their tensors stand in each of the groups, the same objects in all: so they are in ``state_dict`` and users see
    them. This object is a view of them; make one whenever one is needed.

    Args:
        family: whose coefficients they are.
        groups: parameter groups that share them.
    """

    def __init__(self, family: Family, groups: Sequence[Group]) -> None:
        self.family, self.groups = family, groups
        self._shared = groups[0]

    @property
    def values(self) -> Tensor:
        """The values q of all coefficients, shape (K,)."""
        values: Tensor = self._shared["coefficients"]
        return values

    @cached_property
    def _rule(self) -> LearningRule:
        return learning_rule(self._shared)

    @property
    def is_learning(self) -> bool:
        """Whether any coefficient is learned."""
        return any(step_size > 0.0 for step_size in self._shared["hyper_lr"].values())

    @property
    def skipped(self) -> int:
        """How many hypergradients were not finite."""
        return int(self._shared["hyper_skipped"])

    def check_step_sizes(self) -> None:
        """Raise where ``hyper_lr`` of a group, which users may change, is not what can be learned with."""
        names = [coefficient.name for coefficient in self.family.coefficients]
        for group in self.groups:
            step_sizes = group["hyper_lr"]
            if not isinstance(step_sizes, Mapping) or step_sizes.keys() != set(names):
                expected = f"a mapping with {', '.join(names)}"
                raise TypeError(f"hyper_lr of a parameter group must be {expected}, got {step_sizes!r}")
            for name, value in group["special"].items():
                if step_sizes[name] > 0.0:
                    raise ValueError(
                        f"hyper_lr of {name} must stay 0, got {step_sizes[name]!r}: frozen at {value:g} from the "
                        f"start, {name} leaves out a part of the update, which keeps no buffers"
                    )

    # Where they are.

    def follow_parameters(self) -> None:
        """Bring the coefficients to the device of the parameters, which may have moved."""
        device = device_of(self._params)
        if has_values(device) or any(param.grad is not None for param in self._params):
            self.move_to(device)

    @property
    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.groups for param in group["params"])

    def move_to(self, device: torch.device) -> None:
        """Bring the coefficients, and what a captured graph reads of each group, to a device."""
        for key in SET_TENSORS:
            on_host = key == "hyper_steps" and not self._shared["capturable"]
            tensor = move_numbers(self._shared[key], torch.device("cpu") if on_host else device)
            for group in self.groups:
                if group[key] is not tensor:
                    group[key] = tensor
        for group in self.groups:
            if group["capturable"]:
                group[PREVIOUS_LR] = number_on(group[PREVIOUS_LR], device)

    # In a step.

    @property
    def keeps_gradients(self) -> bool:
        """Whether the step to come is left pending, since the one after it wants its hypergradient."""
        if not self.is_learning:
            return False
        # In a captured graph the program cannot depend on the number of steps: it always takes the hypergradient, and
        # the device decides whether to use it.
        return self._shared["capturable"] or self._rule.due(int(self._shared["hyper_steps"]) + 1)

    @property
    def is_due(self) -> bool | Tensor:
        """Whether the step to come takes a hypergradient."""
        if not self.is_learning:
            return False
        steps: Tensor = self._shared["hyper_steps"]
        return self._rule.due(steps) if self._shared["capturable"] else self._rule.due(int(steps))

    @property
    def is_delayed(self) -> bool:
        """Whether they are learned one step late."""
        return self.is_learning and self._rule.delay == 1

    def values_of_last_step(self) -> list[Tensor]:
        """The coefficients with which each group took its last step."""
        return group_values(self.family, self.groups, "previous_betas")

    def take_up_values(self) -> list[Tensor]:
        """The coefficients with which each group takes the step to come, with the betas that users wrote into it."""
        take_up_betas(self.family, self.groups)
        return group_values(self.family, self.groups, "betas")

    def add_up(self, part: Tensor | None, due: bool | Tensor, team: Team | None) -> tuple[Tensor | None, bool | Tensor]:
        """The hypergradient from the parts of all processes, and whether it may be used: one of them must have had one.

        Args:
            part: of this process; None: it has none.
            due: whether a hypergradient is due, which all processes know alike.
            team: processes over which parameters are spread; None: the part is all.
        """
        if team is None:
            return part, due
        if due is False:
            return None, due
        numbers = torch.zeros(len(self.values) + 1, dtype=self.values.dtype, device=self.values.device)
        if part is not None:
            numbers[:-1] = part
            numbers[-1] = 1.0
        total = team.sum(numbers)
        return total[:-1], (total[-1] > 0) & due

    def learn(self, hypergradient: Tensor, due: bool | Tensor, run: Callable[..., None]) -> None:
        """Move the coefficients, where a hypergradient is due.

        Args:
            hypergradient: shape (K,).
            due: as :attr:`is_due`.
            run: what calls a function of a few numbers that changes some of them.
        """
        shared, coefficients = self._shared, self.family.coefficients
        learned = LearnedTensors(*(shared[key] for key in LEARNED_TENSORS))
        step_sizes, boxes = (
            tuple(shared[key][coefficient.name] for coefficient in coefficients) for key in ("hyper_lr", "bounds")
        )
        self._rule.learn(learned, shared["hyper_skipped"], hypergradient, coefficients, step_sizes, boxes, due, run)

    def learn_what_waits(self, run: Callable[..., None]) -> None:
        """Move the coefficients by the hypergradient of the step before, if it took one; see :meth:`learn`."""
        steps, capturable = self._shared["hyper_steps"], self._shared["capturable"]
        if capturable or self._rule.due(int(steps) - 1):
            waiting: Tensor = self._shared["hyper_waiting"]
            self.learn(waiting[:-1], waiting[-1] == (steps if capturable else int(steps)), run)

    def let_wait(self, hypergradient: Tensor | None, due: bool | Tensor) -> None:
        """Let a hypergradient wait for the next step. After other steps it is not used any more.

        Args:
            hypergradient: shape (K,); None: there is none.
            due: as :attr:`is_due`.
        """
        if hypergradient is None or due is False:
            return
        waiting: Tensor = self._shared["hyper_waiting"]
        steps = self._shared["hyper_steps"]
        waiting[:-1] = hypergradient
        waiting[-1] = torch.where(due, steps + 1, 0) if isinstance(due, Tensor) else int(steps) + 1

    def count_step(self) -> None:
        """Count a step that was taken with them."""
        self._shared["hyper_steps"].add_(1)
