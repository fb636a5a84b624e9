"""One step of the parameters that share a set of coefficients, as functions of parameter groups and their state.

The hypergradient h_t needs the buffers before step t, g_t and g_{t+1}; it is known when g_{t+1} arrives. So where one
is due at the next step, the buffers are left as they were before step t and g_t is kept (``pending_grad``): the step is
*pending*. The next step first settles it, which yields the hypergradient and brings the buffers up to date in the same
pass, then moves the coefficients, then goes on. One extra buffer is all that the hypergradient costs in memory.

Where parameters are spread over processes, each process has a part of the hypergradient's sum. The parts are added up
when a hypergradient is due, which all processes know alike: also those that have no element, or no gradient, take part.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.engine.betas import group_values, take_up_betas
from mada_optim.families import Coefficient, Family
from mada_optim.kernels import Batch, Kernels, select_kernels
from mada_optim.kernels.base import SCALAR_STATE, coefficients_and_constants, family_buffers, family_statistics
from mada_optim.learning.rule import LearnedTensors, LearningRule, call
from mada_optim.tensors.devices import device_of, has_float64, has_values, move_numbers, number_on
from mada_optim.tensors.distributed import (
    PLAIN,
    Team,
    check_learnable,
    check_placements,
    find_team,
    local,
    replicate_like,
    spread_like,
    tell_autograd,
)
from mada_optim.tensors.rounding import noise_seed, round_stochastically

# What all parameter groups have in common unless each has coefficients of its own.
SET_SETTINGS = ("hyper_lr", "bounds", "hyper_momentum", "hyper_clip", "hyper_warmup", "hyper_every")
# What learning changes, and all that a set of coefficients keeps, in the parameter groups that share it.
LEARNED_TENSORS = ("coefficients", "hyper_momentum_buffer", "hyper_square_buffer", "hyper_taken")
SET_TENSORS = (*LEARNED_TENSORS, "hyper_skipped", "hyper_steps")

# Where each group keeps the learning rate of its last step.
PREVIOUS_LR = "previous_lr"
# What a parameter keeps, together, only while something is learned, or until the step after that has changed.
PENDING = ("pending", "pending_grad")

Group = dict[str, Any]
State = MutableMapping[Tensor, dict[str, Any]]
Batches = list[tuple[Kernels, Batch]]


def learning_rule(group: Group) -> LearningRule:
    """The rule that a parameter group's settings describe; raises ValueError where they make no sense."""
    return LearningRule(*(group[f"hyper_{name}"] for name in ("momentum", "clip", "warmup", "every")))


def check_step_sizes(family: Family, group: Group) -> None:
    """Raise where a parameter group's ``hyper_lr``, which users may change, is not what the engine can learn with."""
    step_sizes = group["hyper_lr"]
    names = [coefficient.name for coefficient in family.coefficients]
    if not isinstance(step_sizes, Mapping) or step_sizes.keys() != set(names):
        raise TypeError(f"hyper_lr of a parameter group must be a mapping with {', '.join(names)}, got {step_sizes!r}")
    for name, value in group["special"].items():
        if step_sizes[name] > 0.0:
            raise ValueError(
                f"hyper_lr of {name} must stay 0, got {step_sizes[name]!r}: frozen at {value:g} from the start, {name} "
                "leaves out a part of the update, which keeps no buffers"
            )


def check_buffer_names(family: Family, group: Group) -> None:
    """Raise ValueError where a buffer of the family would have the name of something else in a parameter's state."""
    names = [*family_buffers(family, group), *family_statistics(family, group)]
    for name in names:
        if name in ("param", "grad", *SCALAR_STATE, *PENDING) or names.count(name) > 1:
            raise ValueError(f"family: {family.name} has a buffer {name!r}, a name that is taken")


def is_learning(group: Group) -> bool:
    """Whether any coefficient of the group is learned."""
    return any(alpha > 0.0 for alpha in group["hyper_lr"].values())


def buffer_names(family: Family, group: Group) -> tuple[str, ...]:
    """Names of the tensors of its own shape that each parameter of the group keeps."""
    names = family_buffers(family, group)
    return (*names, "pending_grad") if _differentiated(family, group) else names


def prepare_state(family: Family, group: Group, state: State) -> None:
    """Give parameters that have a gradient the state that they need.

    That is all of it before their first step, and later what coefficients need that were not learned until now.
    """
    needed = {"step", *buffer_names(family, group), *family_statistics(family, group)}
    incomplete = [
        param for param in group["params"] if param.grad is not None and not needed <= (state.get(param) or {}).keys()
    ]
    if incomplete and is_learning(group):
        check_learnable(incomplete)
    for param in incomplete:
        own = state.get(param) or {}
        if not own:
            check_placements(param, family.elementwise)  # libraries put others into the place of those given
        state[param] = {**init_state(family, param, group), **own}


def init_state(family: Family, param: Tensor, group: Group, names: Sequence[str] | None = None) -> dict[str, Any]:
    """State of a parameter before its first step. Buffers: ``names``, or what the group's coefficients need."""
    if names is None:
        names = buffer_names(family, group)
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
    for name, shape in family_statistics(family, group).items():
        statistic = torch.zeros(tuple(shape(param.shape)), dtype=exact, device=param.device)
        state[name] = replicate_like(statistic, param)
    return state


def take_step(family: Family, groups: list[Group], state: State, grad_scale: float | Tensor = 1.0) -> Tensor | None:
    """One step of all parameters that have a gradient and of the one set of coefficients that they share.

    Args:
        family: the update rule.
        groups: parameter groups that share the coefficients. Changed in place.
        state: of every parameter with a gradient; see :func:`init_state`. Changed in place.
        grad_scale: by what to multiply the gradients that arrive where they make a hypergradient, which is linear in
            them: see ``HypergradientOptimizer.hyper_grad_scale``.

    Returns:
        The hypergradient, shape (K,) for all K coefficients, if one was taken.
    """
    shared, rule = groups[0], learning_rule(groups[0])
    learning, values = is_learning(shared), shared["coefficients"]
    # In a captured graph the program cannot depend on the number of steps: it always takes the hypergradient, and
    # the device decides whether to use it.
    steps = shared["hyper_steps"] if shared["capturable"] else int(shared["hyper_steps"])
    keep = learning and (shared["capturable"] or rule.due(steps + 1))
    due: bool | Tensor = rule.due(steps)
    team = find_team(param for group in groups for param in group["params"]) if learning else None
    differentiated = [_differentiated(family, group) for group in groups]
    states = [_states(group, state) for group in groups]
    batches = [_batches(family, group, buffers) for group, buffers in zip(groups, states, strict=True)]
    hypergradient = _settle(batches, differentiated, group_values(family, groups, "previous_betas"), keep, team)
    if team is not None:
        hypergradient, due = _add_up(team, hypergradient, values, due)
    if hypergradient is not None:
        if isinstance(grad_scale, Tensor) and grad_scale.device.type != "cpu":
            grad_scale = grad_scale.to(hypergradient.device)
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            hypergradient = hypergradient * grad_scale
        learned = LearnedTensors(*(shared[key] for key in LEARNED_TENSORS))
        step_sizes, boxes = (
            tuple(shared[key][coefficient.name] for coefficient in family.coefficients)
            for key in ("hyper_lr", "bounds")
        )
        run = next((kernels.run_on_numbers for alike in batches for kernels, _ in alike), call)
        rule.learn(learned, shared["hyper_skipped"], hypergradient, family.coefficients, step_sizes, boxes, due, run)
    take_up_betas(family, groups)
    values_by_group = group_values(family, groups, "betas")
    for group, learned_names, alike, buffers, used in zip(
        groups, differentiated, batches, states, values_by_group, strict=True
    ):
        if family.prepares:
            _prepare(family, group, state)
        for kernels, batch in alike:
            if family.prepares:
                batch.refresh()
            if batch.has_grad:
                kernels.step(batch, used, keep and bool(learned_names))
        _finish_steps(alike, buffers, keep, bool(learned_names))
        _remember_lr(group)
    _count(batches)
    shared["hyper_steps"].add_(1)
    return hypergradient


def release(family: Family, groups: list[Group], state: State) -> None:
    """Settle what is pending and drop all that only learning needs, where nothing is learned any more."""
    batches = [_batches(family, group, _states(group, state)) for group in groups]
    differentiated = [_differentiated(family, group) for group in groups]
    _settle(batches, differentiated, group_values(family, groups, "previous_betas"), keep=False, team=None)
    for group in groups:
        for param in group["params"]:
            if state.get(param):
                for name in PENDING:
                    state[param].pop(name, None)


def _settle(
    batches: list[Batches], differentiated: list[list[str]], values: list[Tensor], keep: bool, team: Team | None
) -> Tensor | None:
    """h_t over all parameters whose step t is pending and that have a gradient; None where there are none.

    With a team, it is this process's part of the sum.

    Args:
        batches: of each group.
        differentiated: names of the coefficients by which each group's step is differentiated.
        values: coefficients with which each group took its step.
        keep: as in :meth:`Kernels.settle`.
        team: processes over which parameters are spread.
    """
    total: Tensor | None = None
    for alike, learned, used in zip(batches, differentiated, values, strict=True):
        for kernels, batch in alike:
            aligned = kernels.settle(batch, used, learned, keep) if batch.pending else None
            if aligned is not None:
                share = 1.0 if team is None else team.share(batch.params[0])
                part = aligned * (-batch.group["previous_lr"] * share)
                total = part if total is None else total + part
    return total


def follow_device(groups: list[Group]) -> None:
    """Bring the coefficients that groups share to the device of the parameters, which may have moved."""
    params = [param for group in groups for param in group["params"]]
    device = device_of(params)
    if has_values(device) or any(param.grad is not None for param in params):
        move_shared(groups, device)


def move_shared(groups: list[Group], device: torch.device) -> None:
    """Bring the coefficients that groups share, and what a captured graph reads of each group, to a device."""
    for key in SET_TENSORS:
        on_host = key == "hyper_steps" and not groups[0]["capturable"]
        tensor = move_numbers(groups[0][key], torch.device("cpu") if on_host else device)
        for group in groups:
            group[key] = tensor
    for group in groups:
        if group["capturable"]:
            group[PREVIOUS_LR] = number_on(group[PREVIOUS_LR], device)


def _learned(family: Family, group: Group) -> list[Coefficient]:
    return [coefficient for coefficient in family.coefficients if group["hyper_lr"][coefficient.name] > 0.0]


def _differentiated(family: Family, group: Group) -> list[str]:
    """Names of the learned coefficients by which the last step of the group's parameters is to be differentiated."""
    learned = _learned(family, group)
    if not learned:
        return []
    idle = family.idle({name: group[name] for name in family.constants})
    return [coefficient.name for coefficient in learned if coefficient.name not in idle]


def _prepare(family: Family, group: Group, state: State) -> None:
    """What the family computes of whole tensors before a step."""
    params = [param for param in group["params"] if param.grad is not None and state.get(param)]
    q = coefficients_and_constants(family, group, group["coefficients"])
    grads = [-param.grad if group["maximize"] else param.grad for param in params]
    found = family.prepare([state[param] for param in params], grads, q)
    for index, (param, prepared) in enumerate(zip(params, found, strict=True)):
        for role, (name, value) in enumerate(prepared.items()):
            stored, value = local(state[param][name]), local(value)
            if stored.dtype == torch.bfloat16:
                value = round_stochastically(value.float(), noise_seed(state[param]["step"], index, -1) + role)
            stored.copy_(value)
            tell_autograd([state[param][name]])


def _add_up(team: Team, part: Tensor | None, values: Tensor, due: bool | Tensor) -> tuple[Tensor | None, bool | Tensor]:
    """The hypergradient from the parts of all processes, and whether it may be used: one of them must have had one."""
    if due is False:
        return None, due
    numbers = torch.zeros(len(values) + 1, dtype=values.dtype, device=values.device)
    if part is not None:
        numbers[:-1] = part
        numbers[-1] = 1.0
    total = team.sum(numbers)
    return total[:-1], (total[-1] > 0) & due


def _remember_lr(group: Group) -> None:
    lr = group["lr"].detach().reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    previous = group[PREVIOUS_LR]
    if isinstance(previous, Tensor):  # the same tensor on each replay of a captured graph
        previous.fill_(lr)
    else:
        group[PREVIOUS_LR] = lr.clone() if isinstance(lr, Tensor) else float(lr)


def _finish_steps(batches: Batches, states: list[dict[str, Any]], keep: bool, differentiated: bool) -> None:
    """Note which parameters of a group have a pending step now, and drop what their states need no more."""
    for _, batch in batches:
        # Nothing is pending where learning has begun again and there has been no gradient since.
        pending = batch.has_grad and keep
        if differentiated and batch.pending != pending:
            for own in batch.states:
                if "pending" in own:
                    own["pending"].fill_(pending)
                    if not pending:
                        own["pending_grad"].zero_()  # else what is there would depend on the kernels
    for own in states if not differentiated else ():
        for name in PENDING:
            own.pop(name, None)


def _count(batches: list[Batches]) -> None:
    """Count the step of all parameters that took it."""
    counts = [own["step"] for alike in batches for _, batch in alike if batch.has_grad for own in batch.states]
    if counts and all(count.is_cpu for count in counts):
        # By far the fastest way to count on the host.
        torch._foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)
    elif counts:
        torch._foreach_add_(counts, 1)


def _states(group: Group, state: State) -> list[dict[str, Any]]:
    """What is kept for each parameter of a group, empty before its first step."""
    return [state.get(param) or {} for param in group["params"]]


def _batches(family: Family, group: Group, states: list[dict[str, Any]]) -> Batches:
    """The parameters whose step is pending, or that have a gradient, and who works on them."""
    params: list[Tensor] = group["params"]
    grads = [param.grad for param in params]
    buffers = {*family_buffers(family, group), "pending_grad"}
    pending = [own["pending"].item() if "pending" in own else False for own in states]
    counts: list[Any] = params if group["capturable"] else [own["step"].item() if own else None for own in states]
    keys = (
        pending,
        counts,
        [param.device for param in params],
        [param.dtype for param in params],
        [None if grad is None else grad.dtype for grad in grads],
        [None if type(param) in PLAIN else spread_like(param) for param in params],
    )
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (key, own) in enumerate(zip(zip(*keys, strict=True), states, strict=True)):
        if own and (pending[index] or grads[index] is not None):
            alike.setdefault(key, []).append(index)
    batches: Batches = []
    for members in alike.values():
        first = members[0]
        step = states[first]["step"] if group["capturable"] else counts[first]
        batch = Batch(
            group,
            [params[index] for index in members],
            None if grads[first] is None else [grads[index] for index in members],  # type: ignore[misc]
            [states[index] for index in members],
            buffers,
            step,
            pending[first],
            first,
        )
        batches.append((select_kernels(family, group, batch.device), batch))
    return batches
