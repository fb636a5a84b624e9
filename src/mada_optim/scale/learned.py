"""The learning rate that nobody has to guess: a scale of the whole way, found in the first steps, then held.

:class:`LearnedScale` works on any ``torch.optim.Optimizer``, through its hooks. It knows nothing of families or of the
hypergradients of coefficients.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Adam, Adamax, NAdam, Optimizer, RAdam

from mada_optim.scale.around import check_optimizer, check_searchable, evaluate_closure, step_hooks
from mada_optim.scale.rate import ScaledRate, given_rate
from mada_optim.scale.rule import ADAPTIVE, SearchSettings
from mada_optim.scale.schedule import Schedule
from mada_optim.scale.search import Member, Search, is_low
from mada_optim.scale.way import TENSORS, VISIBLE, check_way
from mada_optim.tables import Table, as_html
from mada_optim.tensors.distributed import check_learnable
from mada_optim.warn import warn

Group = dict[str, Any]
log = logging.getLogger("mada_optim")
_ADAPTIVE_KINDS = (Adam, Adamax, NAdam, RAdam)  # AdamW is an Adam
NAME = "learned_scale"
"""Key of the parameter groups of a state_dict under which the scale stands."""
SAVED = ("log_value", "applied", "held", "steps", "peak")
"""What stands there in every version."""


class LearnedScale:
    """Finds the learning rate of any torch optimizer during its first steps, and then holds it.

    Make it when the optimizer is made, before a learning-rate scheduler. Nothing else changes::

        optimizer = torch.optim.AdamW(model.parameters())
        scale = LearnedScale(optimizer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    The learning rate of the optimizer counts as a share of its highest value so far. It gives the shape of the
    schedule, and the relation of parameter groups to each other; how large it is does not matter. With u_t the
    optimizer's step at a learning rate of 1, weight decay included::

        η_t = lr_t / max_{i≤t} lr_i                 the schedule
        W_t = Σ_{i≤t} η_i u_i                       the way gone, in units of the schedule
        x_{t+1} = x_1 - κ W_t                       κ scales all of it: a step that was too large is taken back
        h_t = -κ ⟨g_{t+1}, σ W_t + (1-σ) W̄_t⟩       W̄: running mean of W; σ = 1/2
        log κ ← log κ - a mean(h)/rms(h)            used one step later; see :class:`SearchSettings` for a

    After 150 steps, or after 30 when the schedule has fallen below half of its peak, κ is multiplied by a margin and
    held, see :func:`~mada_optim.scale.rule.held_scale`. What the search kept of the parameters (6 bytes for each number
    in float32) is freed. From then on the optimizer is itself, at ``scale.learning_rate`` times the schedule.

    ``optimizer.param_groups[i]["lr"]`` shows the rate in use; schedulers go on from the one that they gave, see
    :class:`ScaledRate`. A rate that is a tensor stays what was given. Under DDP every process finds the same scale,
    since every process has the same gradients. Parameters that are spread over processes (FSDP2) cost an all-reduce of
    a few numbers in each step of the search. Capture a CUDA graph after the search.

    Args:
        optimizers: an optimizer, or several that train one model on one loss and share the search, such as
            ``torch.optim.Muon`` for matrices and ``AdamW`` for the rest. In each round all of them step once.
            Optimizers whose losses fight (a GAN's) have no common scale: give them a learning rate.
        per: parameter groups for which this function returns the same value share a scale. None: all share one, "all".
        settings: of the search; or a mapping from values of ``per`` to settings. None: ``ADAPTIVE`` where all
            optimizers are torch's Adam or of its kind, else the defaults of :class:`SearchSettings`.
        held: scales that are held from the start, instead of a search: a number, or a mapping from values of ``per``.

    Raises:
        TypeError: an optimizer is not one of torch's kind, or its steps are no multiples of a rate (LBFGS, Rprop).
        ValueError: an optimizer has a scale already, a parameter group is ``differentiable``, or ``held`` is not a
            positive number for each scale.
        RuntimeError: FSDP1 or ZeroRedundancyOptimizer divides the parameters, so each process would find another scale.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = torch.optim.AdamW([weight], lr=1.0)
    >>> scale = LearnedScale(optimizer)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     (weight**2).sum().backward()
    ...     optimizer.step()
    >>> scale.searching, scale.steps, 0.01 < scale.learning_rate < 1.0
    (False, 150, True)
    """

    search_type: ClassVar[type[Search]] = Search
    """How it searches."""

    def __init__(
        self,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        per: Callable[[Group], Hashable] | None = None,
        settings: SearchSettings | Mapping[Any, SearchSettings] | None = None,
        held: float | Mapping[Any, float] | None = None,
    ) -> None:
        listed = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        if not listed:
            raise ValueError("optimizers must not be empty")
        if len({id(optimizer) for optimizer in listed}) != len(listed):
            raise ValueError("optimizers: one is listed twice")
        for optimizer in listed:
            check_optimizer(optimizer)
        groups = [group for optimizer in listed for group in optimizer.param_groups]
        if held is None:
            check_learnable(param for group in groups for param in group["params"])
        adaptive = all(isinstance(optimizer, _ADAPTIVE_KINDS) for optimizer in listed)
        self._per = per
        kinds = dict.fromkeys(self._kind(group) for group in groups)
        self._search = self.search_type(kinds, ADAPTIVE if settings is None and adaptive else settings)
        self._schedule = Schedule(listed)
        if held is not None:
            scales = held if isinstance(held, Mapping) else dict.fromkeys(kinds, held)
            if scales.keys() != kinds.keys():
                raise ValueError(f"held must have a scale for each of {', '.join(map(repr, kinds))}, got {held!r}")
            self._search.hold({kind: _positive(scales[kind]) for kind in kinds})
            # The rate that is given now is the schedule's peak; a warm-up follows, which no search replaces.
            for group in groups:
                self._schedule.raise_peak(group.get("initial_lr", group["lr"]), on_host=True)
        self.attach(listed)

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the hooks into optimizers that have none of this scale, such as unpickled ones.

        Args:
            optimizers: in the order in which the scale was made with them.
        """
        hooks = [hook for optimizer in optimizers for hook in step_hooks(optimizer)]
        if any(getattr(hook, "__func__", None) is LearnedScale._before_step for hook in hooks):
            raise ValueError("optimizers: one has a learned scale already")
        self._schedule = Schedule(optimizers, self._schedule.peak)
        self._stepped: set[int] = set()
        self._loading: dict[int, dict[str, Any]] = {}
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            optimizer.register_state_dict_post_hook(self._add_to_state_dict)
            optimizer.register_load_state_dict_pre_hook(self._take_from_state_dict)
            optimizer.register_load_state_dict_post_hook(self._load)
        for optimizer in optimizers:
            self._show(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        self._search.collect()
        # Of the optimizers, which keep the scale, only the peak of their rates.
        return {"_per": self._per, "_search": self._search, "_schedule": Schedule([], self._schedule.peak)}

    # What was found.

    @property
    def searching(self) -> bool:
        """Whether the scale is still being learned."""
        return self._search.running

    @property
    def steps(self) -> int:
        """Steps of the search so far; those at a learning rate of 0, or without any gradient, do not count."""
        return self._search.steps

    @property
    def values(self) -> dict[Hashable, float]:
        """κ as it is used, by the values of ``per``: the learning rates at the peak of the schedule."""
        return self._search.values

    @property
    def value(self) -> float:
        """κ as it is used; where parameter groups have scales of their own, the largest."""
        return max(self.values.values())

    @property
    def learning_rate(self) -> float:
        """The learning rate at the peak of the schedule: the same number as :attr:`value`."""
        return self.value

    def rates(self, optimizer: Optimizer) -> list[Any]:
        """Return the learning rates in use of the parameter groups of one of the optimizers.

        Args:
            optimizer: one of those that the scale was made with.
        """
        given = self._schedule.given(optimizer)
        return [self._use(self.kind_of(group), rate) for group, rate in zip(optimizer.param_groups, given, strict=True)]

    def kind_of(self, group: Group) -> Hashable:
        """Return the value of ``per`` for a parameter group; a new one begins with the first scale.

        Args:
            group: of one of the optimizers.
        """
        kind = self._kind(group)
        self._search.add(kind)
        return kind

    def __repr__(self) -> str:
        return f"LearnedScale({self.describe()})"

    def _repr_html_(self) -> str:
        """Show the same in a notebook, as a table."""
        return as_html("LearnedScale", [as_table(self)])

    def hold(self) -> None:
        """End the search now: multiply the scales by the margin, hold them, and free what the search kept."""
        if self.searching:
            self._search.hold()
            log.info(self.describe())
            self._search.warn_of_bounds()

    def describe(self) -> str:
        """Say in one line what was found, or how far the search is."""
        several = len(self.values) > 1
        rates = [f"{value:.2g}" + (f" ({kind})" if several else "") for kind, value in self.values.items()]
        state = "so far" if self.searching else "found"
        return f"learning rate {state}: {', '.join(rates)} after {self.steps} steps"

    # A step. The hooks of all optimizers lead here.

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        changed = None
        self._schedule.note_peak(on_host=self.searching)
        if self.searching:
            check_searchable(optimizer)
            changed = evaluate_closure(args, kwargs)
            found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler that leaves skipping to the step
            if not self._schedule.is_in_step(optimizer) and (found_inf is None or not bool(found_inf)):
                self._join_round(optimizer)
        self._schedule.begin_step(
            optimizer, lambda group, given: self._use(self.kind_of(group), given, self._is_visible(group))
        )
        return changed

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if not self._schedule.is_in_step(optimizer):
            return
        for group in optimizer.param_groups:
            if self._is_visible(group):
                self._search.collect_visible_steps(self.kind_of(group), group)
        self._show(optimizer)

    def _join_round(self, optimizer: Optimizer) -> None:
        """The first optimizer of a round brings the search forward, for all of them."""
        if id(optimizer) in self._stepped:
            self._stepped.clear()
        if not self._stepped:
            self._advance()
        self._stepped.add(id(optimizer))

    def _advance(self) -> None:
        rate = self._schedule.highest_given()
        if rate == 0.0:
            return  # such as the step of torch.distributed.checkpoint, which only wants the state to be there
        members = self._members()
        if not any(param.grad is not None for member in members for param in member.group["params"]):
            return  # nothing happens in such a step, so it is none of the search
        if self._search.is_over(rate, float(self._schedule.peak)):
            self.hold()
        else:
            self._search.advance(members)

    def _members(self) -> list[Member]:
        return [
            Member(self.kind_of(group), group, getattr(optimizer, "grad_scale", None))
            for optimizer in self._schedule.optimizers
            for group in optimizer.param_groups
        ]

    # Groups and their rates.

    def _kind(self, group: Group) -> Hashable:
        return "all" if self._per is None else self._per(group)

    def _is_visible(self, group: Group) -> bool:
        return self.searching and is_low(group)

    def _use(self, kind: Hashable, given: Any, visible: bool = False) -> Any:
        """The rate that is used for a given one; ``visible``: in the step of an optimizer with low precision."""
        return (VISIBLE if visible else self._search.in_use(kind)) * self._schedule.share(given)

    def _show(self, optimizer: Optimizer) -> None:
        this = weakref.ref(self)
        self._schedule.show(optimizer, lambda group: partial(_use_now, this, self.kind_of(group)))
        for group in optimizer.param_groups:
            group.setdefault(NAME, self.state_dict_of(self.kind_of(group)))  # flattened state_dicts ask for its name

    # Saving and loading.

    def state_dict_of(self, kind: Hashable) -> dict[str, Any]:
        """Return all that is known of a scale, without what the search keeps of the parameters.

        Args:
            kind: the value of ``per`` for the parameter groups of the scale.
        """
        return {**self._search.state_dict_of(kind), "peak": float(self._schedule.peak)}

    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._search.collect()
        groups: list[Group] = []
        rates = self._schedule.given(optimizer)
        for group, rate, packed in zip(optimizer.param_groups, rates, state_dict["param_groups"], strict=True):
            plain = {name: given_rate(value) for name, value in packed.items() if isinstance(value, ScaledRate)}
            groups.append({**packed, **plain, "lr": rate, NAME: self.state_dict_of(self.kind_of(group))})
            for param, number in zip(group["params"], packed["params"], strict=True):
                way = self._search.way_of(param)
                if way is not None:
                    state_dict["state"][number] = {**state_dict["state"].get(number, {}), **way.tensors()}
        state_dict["param_groups"] = groups

    def _take_from_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take out what is ours, and keep it until torch has loaded, or refused, the rest."""
        ours: dict[Any, dict[str, Tensor]] = {}
        theirs: dict[Any, Any] = {}
        for number, kept in state_dict["state"].items():
            ours[number] = {name: value for name, value in kept.items() if name in TENSORS}
            rest = {name: value for name, value in kept.items() if name not in TENSORS}
            if rest or not ours[number]:
                theirs[number] = rest
        groups = [
            {name: value for name, value in group.items() if name != NAME} for group in state_dict["param_groups"]
        ]
        check_loadable(optimizer.param_groups, state_dict["param_groups"], ours)
        self._loading[id(optimizer)] = {"state": ours, "param_groups": state_dict["param_groups"]}
        return {**state_dict, "state": theirs, "param_groups": groups}

    def _load(self, optimizer: Optimizer) -> None:
        saved = self._loading.pop(id(optimizer))
        pairs = list(zip(optimizer.param_groups, saved["param_groups"], strict=True))
        self._search.load_ways(
            {
                param: saved["state"].get(number)
                for group, packed in pairs
                for param, number in zip(group["params"], packed["params"], strict=True)
            }
        )
        for group, packed in pairs:
            # Without it this is a checkpoint of the optimizer alone, and the search begins with what was loaded.
            if packed.get(NAME) is not None:
                self._search.load_scale(self.kind_of(group), packed[NAME])
                self._schedule.peak = packed[NAME]["peak"]
        self._schedule.forget_step(optimizer)
        self._show(optimizer)
        if self.searching and self.steps and not self._search.has_ways:
            warn(
                "the checkpoint is of a search for the learning rate that was under way, without what the search keeps "
                "of the parameters, which torch.distributed.checkpoint leaves out where it loads in place; the search "
                "goes on from the parameters as they are"
            )


def check_loadable(groups: list[Group], saved_groups: list[Group], ways: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Raise ValueError where a state_dict lacks a part of a scale, or its tensors do not fit the parameters.

    Args:
        groups: of the optimizer that loads it.
        saved_groups: those of the state_dict.
        ways: what it keeps of parameters, by their numbers.
    """
    for index, (group, packed) in enumerate(zip(groups, saved_groups, strict=False)):  # torch compares their numbers
        scale = packed.get(NAME)
        missing = [key for key in SAVED if scale is not None and key not in scale]
        if missing:
            raise ValueError(
                f"state_dict has no {missing[0]!r} in {NAME!r} of parameter group {index}; was it written by another "
                "version?"
            )
        for param, number in zip(group["params"], packed["params"], strict=False):
            check_way(param, ways.get(number, {}), f"of parameter {number}")


def as_table(scale: LearnedScale) -> Table:
    """Return what a scale found, or how far its search is."""
    state = f"so far, after {scale.steps} steps" if scale.searching else f"found in {scale.steps} steps"
    return ("learning rate", state), [(str(kind), f"{value:.3g}") for kind, value in scale.values.items()]


def _use_now(scale: weakref.ref[LearnedScale], kind: Hashable, given: float) -> float:
    """What a scale makes of a rate. A rate that somebody keeps does not keep the scale, and with it the model."""
    alive = scale()
    return given if alive is None else alive._use(kind, given)


def _positive(value: Any) -> float:
    """Return a held scale as a float. Raises ValueError where it is not a positive number."""
    number = math.nan if isinstance(value, bool) else float(value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"held must be a positive number, or a mapping to positive numbers, got {value!r}")
    return number
