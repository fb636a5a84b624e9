"""One step of the parameters of one group: which of them, in which batches, and who works on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains
from typing import Any, TypeVar

import torch
from torch import Tensor

from mada_optim.engine.betas import ParameterGroup
from mada_optim.engine.coefficient_set import PREVIOUS_LR
from mada_optim.engine.parameter_state import Members, drop_pending, note_pending
from mada_optim.kernels import Batch, CompletePending, Executor, TakeStep, select_executor
from mada_optim.tensors.distributed import PLAIN, Team, local, spread_like, tell_autograd
from mada_optim.tensors.rounding import noise_place, noise_seed, round_stochastically


class GroupStep:
    """The parameters of a group whose step is pending, or that have a gradient, in batches of those that are alike.

    Args:
        members: the parameters of the group, with their gradients and states.
        keep: whether the step that is taken is left pending where the group learns.
    """

    def __init__(self, members: Members, keep: bool) -> None:
        self.members, self.keep = members, keep
        self.update = members.update
        self.group: Any = members.update.group
        self.batches = list(self._make_batches())

    def complete_pending(self, values: Tensor, team: Team | None) -> Iterator[Tensor]:
        """Complete the pending steps, and yield what each batch adds to the hypergradient h_t.

        Args:
            values: coefficients with which they were taken.
            team: processes over which parameters are spread; what is yielded is this process's part.
        """
        for executor, batch in self.batches:
            if not batch.pending:
                continue
            task = CompletePending(self.update, self.keep, has_grad=batch.has_grad)
            aligned = executor.run(task, batch, values)
            if aligned is not None:
                share = 1.0 if team is None else team.share(batch.params[0])
                yield aligned * (-self.group[PREVIOUS_LR] * share)

    def take(self, values: Tensor) -> None:
        """Take the step of all parameters that have a gradient.

        Args:
            values: coefficients of the step.
        """
        if self.update.family.prepares:
            self._prepare()
        task = TakeStep(self.update, self.keep and bool(self.update.learned))
        for executor, batch in self.batches:
            if batch.has_grad:
                executor.run(task, batch, values)

    def finish(self) -> None:
        """Note which parameters have a pending step now, drop what they need no more, remember the learning rate."""
        learned = bool(self.update.learned)
        for _, batch in self.batches:
            # Nothing is pending where learning has begun again and there has been no gradient since.
            pending = batch.has_grad and self.keep
            if learned and batch.pending != pending:
                note_pending(batch.states, pending)
        if not learned:
            drop_pending(self.members.states)
        self._remember_lr()

    @property
    def states_that_stepped(self) -> Iterator[dict[str, Any]]:
        """States of the parameters that have a gradient."""
        return chain.from_iterable(batch.states for _, batch in self.batches if batch.has_grad)

    def _prepare(self) -> None:
        """What the family computes of whole tensors before a step."""
        with_grad = [
            (grad, state)
            for grad, state in zip(self.members.grads, self.members.states, strict=True)
            if grad is not None and state
        ]
        q = self.update.arguments(self.group["coefficients"])
        grads = [-grad if self.group["maximize"] else grad for grad, _ in with_grad]
        prepared = self.update.family.prepare([state for _, state in with_grad], grads, q)
        for index, ((_, state), tensors) in enumerate(zip(with_grad, prepared, strict=True)):
            for place, (name, value) in enumerate(tensors.items()):
                stored, value = local(state[name]), local(value)
                if stored.dtype == torch.bfloat16:
                    value = round_stochastically(
                        value.float(), noise_seed(noise_place(index, -1), state["step"]) + place
                    )
                stored.copy_(value)
                tell_autograd([state[name]])
        for _, batch in self.batches:
            batch.refresh()

    def _remember_lr(self) -> None:
        given = self.group["lr"]
        lr = given.detach().reshape(()) if isinstance(given, Tensor) else given
        previous = self.group[PREVIOUS_LR]
        if isinstance(previous, Tensor):  # the same tensor on each replay of a captured graph
            previous.fill_(lr)
        else:
            self.group[PREVIOUS_LR] = lr.clone() if isinstance(lr, Tensor) else float(lr)

    def _make_batches(self) -> Iterator[tuple[Executor, Batch]]:
        """The parameters, by all in which a batch has to agree."""
        params, grads, states = self.members.params, self.members.grads, self.members.states
        pending = _numbers(states, "pending", False)
        columns: list[Sequence[Any]] = [
            pending,
            params if self.group["capturable"] else _numbers(states, "step", None),
            list(map(_device, params)),
            list(map(_dtype, params)),
            [None if grad is None else grad.dtype for grad in grads],
        ]
        if not set(map(type, params)) <= PLAIN:
            columns.append(list(map(spread_like, params)))
        members: Iterable[Sequence[int]] = [range(len(params))] if params else []
        if not all(len(set(column)) == 1 for column in columns):
            by_key: dict[tuple[Any, ...], list[int]] = {}
            for number, key in enumerate(zip(*columns, strict=True)):
                by_key.setdefault(key, []).append(number)
            members = by_key.values()
        for numbers in members:
            first = numbers[0]
            if states[first] and (pending[first] or grads[first] is not None):
                yield self._batch(numbers, columns[1][first], pending[first])

    def _batch(self, numbers: Sequence[int], step: float | Tensor, pending: bool) -> tuple[Executor, Batch]:
        """A batch of the parameters with these numbers, and who works on it."""
        first, members = numbers[0], self.members
        batch = Batch(
            self.update,
            _chosen(members.params, numbers),
            None if members.grads[first] is None else _chosen(members.grads, numbers),  # type: ignore[arg-type]
            _chosen(members.states, numbers),
            (*self.update.buffers, "pending_grad"),
            members.states[first]["step"] if self.group["capturable"] else step,
            pending,
            first,
            self.group.kept_for(tuple(numbers)) if isinstance(self.group, ParameterGroup) else {},
        )
        return select_executor(self.update.family, self.group, batch.device), batch


_device, _dtype = attrgetter("device"), attrgetter("dtype")
_Item = TypeVar("_Item")


def _chosen(items: Sequence[_Item], numbers: Sequence[int]) -> Sequence[_Item]:
    return items if len(items) == len(numbers) else [items[number] for number in numbers]


def _numbers(states: Sequence[dict[str, Any]], name: str, otherwise: Any) -> list[Any]:
    """Read a number of each state, on the host; ``otherwise`` where there is none."""
    there = list(map(contains, states, repeat(name)))
    if all(there):
        return [state[name].item() for state in states]
    if True not in there:
        return [otherwise] * len(there)
    return [state[name].item() if name in state else otherwise for state in states]
