"""One step of the parameters of one group: which of them, in which batches, and who works on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, contains
from typing import Any, TypeVar

import torch
from torch import Tensor

from mada_optim.engine.betas import ParameterGroup
from mada_optim.engine.coefficient_set import PREVIOUS_LR
from mada_optim.engine.parameter_state import Members, count_steps, drop_pending, note_pending
from mada_optim.kernels import Batch, CompleteAndTake, CompletePending, Executor, Pass, TakeStep, select_executor
from mada_optim.tensors.alike import compare_at_once, never
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
            if batch.pending:
                task = CompletePending(self.update, self.keep, has_grad=batch.has_grad)
                yield from self._differentiate(task, executor, batch, values, team)

    def take(self, values: Tensor) -> None:
        """Take the step of all parameters that have a gradient.

        Args:
            values: coefficients of the step.
        """
        if self.update.family.prepares:
            self._prepare()
        for executor, batch in self.batches:
            if batch.has_grad:
                executor.run(TakeStep(self.update, self._keeps), batch, values)

    def complete_and_take(self, before: Tensor, values: Tensor, team: Team | None) -> Iterator[Tensor]:
        """Do both, in one pass over memory where that is possible; see :meth:`complete_pending`.

        Args:
            before: coefficients of the pending steps.
            values: coefficients of the step that is taken.
            team: processes over which parameters are spread.
        """
        if self.update.family.prepares:  # between the two, what the update only reads is made anew
            yield from self.complete_pending(before, team)
            self.take(values)
            return
        for executor, batch in self.batches:
            if batch.pending and batch.has_grad:
                task = CompleteAndTake(self.update, self._keeps)
                yield from self._differentiate(task, executor, batch, torch.cat([before, values]), team)
            elif batch.pending:
                executor.run(CompletePending(self.update, self.keep, has_grad=False), batch, before)
            else:
                executor.run(TakeStep(self.update, self._keeps), batch, values)

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

    def count(self) -> None:
        """Count a step of the parameters that have a gradient."""
        count_steps(chain.from_iterable(batch.states for _, batch in self.batches if batch.has_grad))

    @property
    def _keeps(self) -> bool:
        """Whether the step that is taken is left pending."""
        return self.keep and bool(self.update.learned)

    def _differentiate(
        self, task: Pass, executor: Executor, batch: Batch, values: Tensor, team: Team | None
    ) -> Iterator[Tensor]:
        """Run a pass, and yield what the batch adds to the hypergradient h_t, if it has a part in it."""
        aligned = executor.run(task, batch, values)
        if aligned is not None:
            share = 1.0 if team is None else team.share(batch.params[0])
            yield aligned * (-self.group[PREVIOUS_LR] * share)

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
        members, states = self.members, self.members.states
        kinds = self._kinds()
        pending = _numbers(states, "pending", False)
        devices = kinds.columns[0]
        counts: Sequence[Any]
        executors = {device: select_executor(self.update.family, self.group, device) for device in set(devices)}
        if self.group["capturable"]:  # on the device, where they cannot be compared
            one_by_one = (not executors[device].counts_each for device in devices)
            counts = [param if alone else None for param, alone in zip(members.params, one_by_one, strict=True)]
        else:
            counts = _numbers(states, "step", None)
        columns = [pending, counts, *kinds.columns]
        batches: Iterable[Sequence[int]] = [range(len(states))] if states else []
        if not all(len(set(column)) == 1 for column in columns):
            by_key: dict[tuple[Any, ...], list[int]] = {}
            for number, key in enumerate(zip(*columns, strict=True)):
                by_key.setdefault(key, []).append(number)
            batches = by_key.values()
        for numbers in batches:
            first = numbers[0]
            if states[first] and (pending[first] or members.grads[first] is not None):
                yield executors[devices[first]], self._batch(numbers, counts[first], pending[first], kinds)

    def _kinds(self) -> Kinds:
        """What the parameters and their gradients are; the object of the last step where it still holds."""
        kept: Kinds | None = getattr(self.group, "kinds", None)
        if kept is not None and kept.are_known_of(self.members):
            return kept
        kinds = Kinds(self.members)
        if isinstance(self.group, ParameterGroup):
            if kept is not None and kept.columns == kinds.columns:  # they seem to stay
                kinds.know(self.members)
            self.group.kinds = kinds
        return kinds

    def _batch(self, numbers: Sequence[int], step: float | Tensor, pending: bool, kinds: Kinds) -> Batch:
        """A batch of the parameters with these numbers."""
        first, members = numbers[0], self.members
        return Batch(
            self.update,
            _chosen(members.params, numbers),
            None if members.grads[first] is None else _chosen(members.grads, numbers),  # type: ignore[arg-type]
            _chosen(members.states, numbers),
            (*self.update.buffers, "pending_grad"),
            members.states[first]["step"] if self.group["capturable"] else step,
            pending,
            first,
            kinds if kinds.are_known else None,
            self.group.kept_for(tuple(numbers)) if isinstance(self.group, ParameterGroup) else {},
        )


class Kinds:
    """What parameters and gradients are, as far as all of a batch have to be the same. It keeps none of them.

    Args:
        members: of which group.
    """

    def __init__(self, members: Members) -> None:
        params, grads = members.params, members.grads
        self.columns: list[Sequence[Any]] = [
            list(map(_device, params)),
            list(map(_dtype, params)),
            [None if grad is None else grad.dtype for grad in grads],
        ]
        if not set(map(type, params)) <= PLAIN:
            self.columns.append(list(map(spread_like, params)))
        self.are_known = False
        self._have_grad: list[bool] = []
        self._are_alike: Callable[..., bool] = never

    def know(self, members: Members) -> None:
        """Know these, and all that are like them in all but values and addresses."""
        if len(self.columns) == 3:  # of DTensors there is more to know
            self.are_known, self._have_grad = True, _have_grad(members)
            self._are_alike = compare_at_once(_tensors(members, self._have_grad))

    def are_known_of(self, members: Members) -> bool:
        """Whether those of a group are known to be like those that are known."""
        have_grad = _have_grad(members)
        return have_grad == self._have_grad and self._are_alike(*_tensors(members, have_grad))


def _have_grad(members: Members) -> list[bool]:
    return [grad is not None for grad in members.grads]


def _tensors(members: Members, have_grad: Sequence[bool]) -> list[Tensor]:
    """Parameters, and gradients where there are any."""
    grads: Any = compress(members.grads, have_grad)
    return [*members.params, *grads]


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
