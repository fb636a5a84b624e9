"""One step of the parameters of one group: which of them, in which batches, and who works on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mada_optim.engine.coefficient_set import PREVIOUS_LR
from mada_optim.engine.parameter_state import State, drop_pending, note_pending
from mada_optim.families import Family
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.kernels import Batch, CompletePending, Executor, TakeStep, select_executor
from mada_optim.tensors.distributed import PLAIN, Team, local, spread_like, tell_autograd
from mada_optim.tensors.rounding import noise_seed, round_stochastically


class GroupStep:
    """The parameters of a group whose step is pending, or that have a gradient, in batches of those that are alike.

    Args:
        family: the update rule.
        group: the parameter group.
        state: of the optimizer.
        keep: whether the step that is taken is left pending where the group learns.
    """

    def __init__(self, family: Family, group: dict[str, Any], state: State, keep: bool) -> None:
        self.group, self.keep = group, keep
        self.update = FamilyInGroup(family, group)
        self.states: list[dict[str, Any]] = [state.get(param) or {} for param in group["params"]]
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
            drop_pending(self.states)
        self._remember_lr()

    @property
    def states_that_stepped(self) -> Iterator[dict[str, Any]]:
        """States of the parameters that have a gradient."""
        return (state for _, batch in self.batches if batch.has_grad for state in batch.states)

    def _prepare(self) -> None:
        """What the family computes of whole tensors before a step."""
        with_grad = [
            (param, state)
            for param, state in zip(self.group["params"], self.states, strict=True)
            if param.grad is not None and state
        ]
        q = self.update.arguments(self.group["coefficients"])
        grads = [-param.grad if self.group["maximize"] else param.grad for param, _ in with_grad]
        prepared = self.update.family.prepare([state for _, state in with_grad], grads, q)
        for index, ((_, state), tensors) in enumerate(zip(with_grad, prepared, strict=True)):
            for place, (name, value) in enumerate(tensors.items()):
                stored, value = local(state[name]), local(value)
                if stored.dtype == torch.bfloat16:
                    value = round_stochastically(value.float(), noise_seed(state["step"], index, -1) + place)
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
        params: list[Tensor] = self.group["params"]
        capturable = self.group["capturable"]
        grads = [param.grad for param in params]
        pending = [state["pending"].item() if "pending" in state else False for state in self.states]
        counts: list[Any] = params if capturable else [state["step"].item() if state else None for state in self.states]
        keys = zip(
            pending,
            counts,
            [param.device for param in params],
            [param.dtype for param in params],
            [None if grad is None else grad.dtype for grad in grads],
            [None if type(param) in PLAIN else spread_like(param) for param in params],
            strict=True,
        )
        members_by_key: dict[tuple[Any, ...], list[int]] = {}
        for index, key in enumerate(keys):
            if self.states[index] and (pending[index] or grads[index] is not None):
                members_by_key.setdefault(key, []).append(index)
        visible = {*self.update.buffers, "pending_grad"}
        for members in members_by_key.values():
            first = members[0]
            batch = Batch(
                self.update,
                [params[index] for index in members],
                None if grads[first] is None else [grads[index] for index in members],  # type: ignore[misc]
                [self.states[index] for index in members],
                visible,
                self.states[first]["step"] if capturable else counts[first],
                pending[first],
                first,
            )
            yield select_executor(self.update.family, self.group, batch.device), batch
