"""One step of the parameters that share a set of coefficients, as functions of parameter groups and their state.

The hypergradient h_t needs the buffers before step t, g_t and g_{t+1}; it is known when g_{t+1} arrives. So where one
is due at the next step, the buffers are left as they were before step t and g_t is kept (``pending_grad``): the step is
*pending*. The next step first differentiates it, then repeats it with the coefficients that it had, to advance the
buffers, and goes on from there. One extra buffer is all that the hypergradient costs in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mada_optim.blocks import Block, Roles, make_blocks
from mada_optim.coefficients import LearningRule
from mada_optim.family import Family
from mada_optim.hypergradient import alignment_gradient

# What a set of coefficients keeps in the parameter groups that share it.
SET_TENSORS = ("coefficients", "hyper_momentum_buffer", "hyper_skipped")
# What a parameter keeps beside tensors of its own shape.
SCALAR_STATE = ("step", "pending")

Group = dict[str, Any]
State = MutableMapping[Tensor, dict[str, Any]]


def learning_rule(group: Group) -> LearningRule:
    """The rule that a parameter group's settings describe; raises ValueError where they make no sense."""
    return LearningRule(*(group[f"hyper_{name}"] for name in ("momentum", "clip", "warmup", "every")))


def is_learning(group: Group) -> bool:
    """Whether any coefficient of the group is learned."""
    return any(alpha > 0.0 for alpha in group["hyper_lr"].values())


def buffer_names(family: Family, group: Group) -> tuple[str, ...]:
    """Names of the tensors of its own shape that each parameter of the group keeps."""
    names = family.buffers(_coefficients_and_constants(family, group, group["coefficients"]))
    return (*names, "pending_grad") if is_learning(group) else names


def init_state(family: Family, param: Tensor, group: Group) -> dict[str, Any]:
    """State of a parameter before its first step: what the group's learned and non-neutral coefficients need."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    if is_learning(group):
        state["pending"] = torch.zeros((), dtype=torch.bool, device="cpu")
    for name in buffer_names(family, group):
        state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return state


def take_step(family: Family, groups: list[Group], state: State) -> Tensor | None:
    """One step of all parameters that have a gradient and of the one set of coefficients that they share.

    Args:
        family: the update rule.
        groups: parameter groups that share the coefficients. Changed in place.
        state: of every parameter with a gradient; see :func:`init_state`. Changed in place.

    Returns:
        The hypergradient, shape (K,) for all K coefficients, if one was taken.
    """
    shared, rule = groups[0], learning_rule(groups[0])
    learning, steps = is_learning(shared), shared["hyper_steps"]
    before = shared["coefficients"].clone()
    hypergradient = _hypergradient(family, groups, state, before) if learning and rule.due(steps) else None
    if hypergradient is not None:
        values, momentum_buffer, skipped = (shared[key] for key in SET_TENSORS)
        step_sizes, boxes = tuple(shared["hyper_lr"].values()), tuple(shared["bounds"].values())
        rule.learn(values, momentum_buffer, skipped, hypergradient, step_sizes, boxes)
    after = shared["coefficients"].clone()
    keep = learning and rule.due(steps + 1)
    for group in groups:
        _settle_without_grad(family, group, state, before)
        for batch in _batches(family, group, state):
            for block in batch.blocks:
                _update_block(family, block, batch, before, after, keep)
        for param in group["params"]:
            if state.get(param):
                _finish_step(state[param], param.grad is not None, keep, learning)
        group["hyper_steps"] = steps + 1
        group["previous_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
    return hypergradient


def _hypergradient(family: Family, groups: list[Group], state: State, values: Tensor) -> Tensor | None:
    """h_t over all parameters whose step t is pending and that have a gradient; None where there are none."""
    step_sizes = groups[0]["hyper_lr"]
    learned = [name for name, alpha in step_sizes.items() if alpha > 0.0]
    index = [i for i, name in enumerate(step_sizes) if name in learned]
    total: Tensor | None = None
    for group in groups:
        for batch in _batches(family, group, state):
            if not batch.pending:
                continue
            q = batch.q(family, values)
            for block in batch.blocks:
                aligned = alignment_gradient(
                    family,
                    {name: block.read(name, batch.dtype) for name in family.buffers(q)},
                    block.read("pending_grad", batch.dtype),
                    batch.grad(block),
                    q,
                    learned,
                    batch.step,
                )
                total = torch.zeros_like(values) if total is None else total
                total[index] -= group["previous_lr"] * aligned.to(total.device)
    return total


def _update_block(family: Family, block: Block, batch: _Batch, before: Tensor, after: Tensor, keep: bool) -> None:
    """Step t+1 of one block with the coefficients ``after``; a pending step t is advanced with ``before`` first."""
    grad, q = batch.grad(block), batch.q(family, after)
    names = family.buffers(q)
    stored = current = {name: block.read(name, batch.dtype) for name in names}
    if batch.pending:
        pending_grad = block.read("pending_grad", batch.dtype)
        _, current = family.update(stored, pending_grad, batch.q(family, before), batch.step)
    direction, advanced = family.update(current, grad, q, batch.step + 1)
    lr, weight_decay = batch.group["lr"], batch.group["weight_decay"]
    block.write("param", block.read("param", batch.dtype) * (1 - lr * weight_decay) - lr * direction)
    # Buffers first: one that was advanced may be the stored pending gradient itself.
    new = current if keep else advanced
    if new is not stored:
        for name in names:
            block.write(name, new[name])
    if keep:
        block.write("pending_grad", grad)


def _settle_without_grad(family: Family, group: Group, state: State, before: Tensor) -> None:
    """Advance the buffers of pending parameters that have no gradient now: their coefficients are about to change."""
    for batch in _batches(family, group, state, with_grad=False):
        if not batch.pending:
            continue
        q = batch.q(family, before)
        for block in batch.blocks:
            stored = {name: block.read(name, batch.dtype) for name in family.buffers(q)}
            _, advanced = family.update(stored, block.read("pending_grad", batch.dtype), q, batch.step)
            for name, value in advanced.items():
                block.write(name, value)


def _finish_step(state: dict[str, Any], stepped: bool, keep: bool, learning: bool) -> None:
    if stepped:
        state["step"] += 1
    if learning:
        state["pending"].fill_(stepped and keep)
    else:
        state.pop("pending", None)
        state.pop("pending_grad", None)


@dataclass(frozen=True)
class _Batch:
    """Parameters of one group that agree in device, dtype, number of completed steps, and whether the last is pending.

    ``step`` is that number, 0-dimensional float64 on the device.
    """

    group: Group
    roles: list[Roles]
    step: Tensor
    pending: bool
    elementwise: bool

    @property
    def blocks(self) -> Iterator[Block]:
        return make_blocks(self.roles, self.elementwise)

    @property
    def dtype(self) -> torch.dtype:
        """In which the arithmetic is done, and the buffers are kept."""
        return torch.promote_types(self.roles[0]["param"].dtype, torch.float32)

    def grad(self, block: Block) -> Tensor:
        """Gradient of what is minimized."""
        grad = block.read("grad", self.dtype)
        return -grad if self.group["maximize"] else grad

    def q(self, family: Family, values: Tensor) -> dict[str, Any]:
        """Coefficients and constants as :meth:`Family.update` takes them."""
        return _coefficients_and_constants(family, self.group, values.to(self.step.device))


def _batches(family: Family, group: Group, state: State, with_grad: bool = True) -> Iterator[_Batch]:
    def key(param: Tensor) -> tuple[str, str, float, bool]:
        own = state[param]
        return str(param.device), str(param.dtype), float(own["step"]), "pending" in own and bool(own["pending"])

    params = [param for param in group["params"] if state.get(param) and (param.grad is not None) == with_grad]
    # Sorting is stable: the order of summation, and so every bit of the result, is the parameters' order.
    for (_, _, count, pending), members in groupby(sorted(params, key=key), key=key):
        roles = [_roles(param, state[param]) for param in members]
        step = torch.tensor(count, dtype=torch.float64, device=roles[0]["param"].device)
        yield _Batch(group, roles, step, pending, family.elementwise)


def _roles(param: Tensor, state: Mapping[str, Any]) -> Roles:
    tensors = {"param": param} | {name: value for name, value in state.items() if name not in SCALAR_STATE}
    if param.grad is not None:
        tensors["grad"] = param.grad.resolve_conj()
    return {role: torch.view_as_real(t) if t.is_complex() else t for role, t in tensors.items()}


def _coefficients_and_constants(family: Family, group: Group, values: Tensor) -> dict[str, Any]:
    names = (coefficient.name for coefficient in family.coefficients)
    constants = {name: group[name] for name in family.constants}
    return {**dict(zip(names, values.unbind(), strict=True)), **group["special"], **constants}
