"""One step of the parameters that share a set of coefficients.

The hypergradient h_t needs the buffers before step t, g_t and g_{t+1}; it is known when g_{t+1} arrives. So where one
is due at the next step, the step is left *pending*: the buffers stay as they were before it, and g_t is kept. The next
step first completes it, which yields the hypergradient and brings the buffers up to date in the same pass, then moves
the coefficients, then goes on. One extra buffer is all that the hypergradient costs in memory.

Where parameters are spread over processes, each process has a part of the hypergradient's sum. The parts are added up
when a hypergradient is due, which all processes know alike: also those that have no element, or no gradient, take part.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mada_optim.engine.coefficient_set import CoefficientSet
from mada_optim.engine.group_step import GroupStep
from mada_optim.engine.parameter_state import Members, State, drop_pending
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.learning.rule import call
from mada_optim.tensors.distributed import Team, find_team


def take_step(
    coefficients: CoefficientSet, members: Sequence[Members], grad_scale: float | Tensor = 1.0
) -> Tensor | None:
    """One step of all parameters that have a gradient, and of the coefficients that they share.

    Args:
        coefficients: the set, with its parameter groups. Changed in place.
        members: the parameters of each group, prepared by :class:`ParameterState`. Changed in place.
        grad_scale: by what to multiply the gradients that arrive where they make a hypergradient, which is linear in
            them: see ``HypergradientOptimizer.hyper_grad_scale``.

    Returns:
        The hypergradient, shape (K,) for all K coefficients, if one was taken.
    """
    keep, due = coefficients.keeps_gradients, coefficients.is_due
    team = find_team(param for each in members for param in each.params) if coefficients.is_learning else None
    steps = [GroupStep(each, keep) for each in members]

    part = _measure(steps, coefficients.values_of_last_step(), team)
    hypergradient, due = coefficients.add_up(part, due, team)
    if hypergradient is not None:
        hypergradient = _scaled(hypergradient, grad_scale)
        runners = (executor.run_on_numbers for step in steps for executor, _ in step.batches)
        coefficients.learn(hypergradient, due, next((run for run in runners if run is not call), call))

    for step, values in zip(steps, coefficients.take_up_values(), strict=True):
        step.take(values)
        step.finish()
        step.count()
    coefficients.count_step()
    return hypergradient


def release(coefficients: CoefficientSet, state: State) -> None:
    """Complete what is pending and drop all that only learning needs, where nothing is learned any more."""
    updates = (FamilyInGroup(coefficients.family, group) for group in coefficients.groups)
    steps = [GroupStep(Members.of(update, state), keep=False) for update in updates]
    _measure(steps, coefficients.values_of_last_step(), team=None)
    for step in steps:
        drop_pending(step.members.states)


def _measure(steps: list[GroupStep], values: list[Tensor], team: Team | None) -> Tensor | None:
    """h_t over all parameters whose step t is pending and that have a gradient; None where there are none."""
    total: Tensor | None = None
    for step, used in zip(steps, values, strict=True):
        for part in step.complete_pending(used, team):
            total = part if total is None else total + part
    return total


def _scaled(hypergradient: Tensor, grad_scale: float | Tensor) -> Tensor:
    if isinstance(grad_scale, Tensor) and grad_scale.device.type != "cpu":
        grad_scale = grad_scale.to(hypergradient.device)
    return hypergradient * grad_scale if isinstance(grad_scale, Tensor) or grad_scale != 1.0 else hypergradient
