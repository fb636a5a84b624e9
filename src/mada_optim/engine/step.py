"""One step of the parameters that share a set of coefficients.

The hypergradient h_t needs the buffers before step t, g_t and g_{t+1}; it is known when g_{t+1} arrives. So where one
is due at the next step, the step is left *pending*: the buffers stay as they were before it, and g_t is kept. The next
step first completes it, which yields the hypergradient and brings the buffers up to date in the same pass, then moves
the coefficients, then goes on. One extra buffer is all that the hypergradient costs in memory.

With ``hyper_delay=1`` the coefficients move by the hypergradient of the step before, h_{t-1}, which is known already.
So the pending step is completed and the next one taken in one pass over memory instead of two, while h_t waits.

Where parameters are spread over processes, each process has a part of the hypergradient's sum. The parts are added up
when a hypergradient is due, which all processes know alike: also those that have no element, or no gradient, take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

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

    runners = (executor.run_on_numbers for step in steps for executor, _ in step.batches)
    run = next((run for run in runners if run is not call), call)
    of_last_step = coefficients.values_of_last_step()
    if coefficients.is_delayed:
        shared = coefficients.values.clone()  # which learning changes in place
        of_last_step = [shared if values is coefficients.values else values for values in of_last_step]
        coefficients.learn_what_waits(run)
        pairs = zip(steps, of_last_step, coefficients.take_up_values(), strict=True)
        part = _total(chain.from_iterable(step.complete_and_take(before, now, team) for step, before, now in pairs))
        hypergradient, due = _whole(coefficients, part, due, team, grad_scale)
        coefficients.let_wait(hypergradient, due)
    else:
        part = _complete(steps, of_last_step, team)
        hypergradient, due = _whole(coefficients, part, due, team, grad_scale)
        if hypergradient is not None:
            coefficients.learn(hypergradient, due, run)
        for step, values in zip(steps, coefficients.take_up_values(), strict=True):
            step.take(values)
    for step in steps:
        step.finish()
        step.count()
    coefficients.count_step()
    return hypergradient


def release(coefficients: CoefficientSet, state: State) -> None:
    """Complete what is pending and drop all that only learning needs, where nothing is learned any more."""
    updates = (FamilyInGroup(coefficients.family, group) for group in coefficients.groups)
    steps = [GroupStep(Members.of(update, state), keep=False) for update in updates]
    _complete(steps, coefficients.values_of_last_step(), team=None)
    for step in steps:
        drop_pending(step.members.states)


def _complete(steps: list[GroupStep], values: list[Tensor], team: Team | None) -> Tensor | None:
    """Complete what is pending; h_t over all parameters that have a gradient, None where there are none."""
    pairs = zip(steps, values, strict=True)
    return _total(chain.from_iterable(step.complete_pending(used, team) for step, used in pairs))


def _total(parts: Iterable[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _whole(
    coefficients: CoefficientSet,
    part: Tensor | None,
    due: bool | Tensor,
    team: Team | None,
    grad_scale: float | Tensor,
) -> tuple[Tensor | None, bool | Tensor]:
    """The hypergradient from the parts of all processes, scaled, and whether it may be used."""
    hypergradient, due = coefficients.add_up(part, due, team)
    if hypergradient is None:
        return None, due
    if isinstance(grad_scale, Tensor) and grad_scale.device.type != "cpu":
        grad_scale = grad_scale.to(hypergradient.device)
    is_scaled = isinstance(grad_scale, Tensor) or grad_scale != 1.0
    return hypergradient * grad_scale if is_scaled else hypergradient, due
