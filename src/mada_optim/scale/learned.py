"""The learning rate that nobody has to guess: a scale of the whole way, found in the first steps, then held.

:class:`LearnedScale` works on any ``torch.optim.Optimizer``, through its hooks. It knows nothing of families or of the
hypergradients of coefficients.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Adam, Adamax, NAdam, Optimizer, RAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mada_optim.scale.around import (
    Pending,
    check_optimizer,
    check_searchable,
    evaluate_closure,
    highest,
    is_low,
    positive,
    step_hooks,
    use_now,
)
from mada_optim.scale.rate import ScaledRate, given_rate, plateau_of
from mada_optim.scale.rule import ADAPTIVE, ScaleState, SearchSettings, as_lively, held_scale, learn
from mada_optim.scale.way import TENSORS, VISIBLE, Way, follow
from mada_optim.tables import Table, as_html
from mada_optim.tensors.distributed import check_learnable, find_team, spread_like
from mada_optim.warn import warn

Group = dict[str, Any]
log = logging.getLogger("mada_optim")
_ADAPTIVE_KINDS = (Adam, Adamax, NAdam, RAdam)  # AdamW is an Adam
LEAST_STEPS = 30
"""Steps after which the search may end because the schedule has fallen."""
NAME = "learned_scale"
"""Key of the parameter groups of a state_dict under which the scale stands."""


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
        if held is None:
            check_learnable(
                param for optimizer in listed for group in optimizer.param_groups for param in group["params"]
            )
        self.searching = held is None
        """Whether the scale is still being learned."""
        self.steps = 0
        """Steps of the search so far; those at a learning rate of 0 do not count."""
        self._per = per
        adaptive = all(isinstance(optimizer, _ADAPTIVE_KINDS) for optimizer in listed)
        self._settings = ADAPTIVE if settings is None and adaptive else settings
        self._states: dict[Hashable, ScaleState] = {}
        self._applied: dict[Hashable, float] = {}  # at which scales the parameters lie, during the search
        self._held: dict[Hashable, float] = {}
        self._ways: dict[Tensor, Way] = {}
        self._pending: Pending | None = None
        self._peak: float | Tensor = 0.0
        for optimizer in listed:
            for group in optimizer.param_groups:
                key = "all" if per is None else per(group)
                self._states[key] = ScaleState(math.log(self._settings_of(key).start))
        if held is not None:
            scales = held if isinstance(held, Mapping) else dict.fromkeys(self._states, held)
            if scales.keys() != self._states.keys():
                kinds = ", ".join(map(repr, self._states))
                raise ValueError(f"held must have a scale for each of {kinds}, got {held!r}")
            self._held = {key: positive(scales[key]) for key in self._states}
            # The rate that is given now is the schedule's peak; a warm-up follows, which no search replaces.
            for optimizer in listed:
                for group in optimizer.param_groups:
                    self._peak = highest(self._peak, group.get("initial_lr", group["lr"]), on_host=True)
        self.attach(listed)

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the hooks into optimizers that have none of this scale, such as unpickled ones.

        Args:
            optimizers: in the order in which the scale was made with them.
        """
        # Weak references: the optimizers keep the scale, by their hooks.
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._stepped: set[int] = set()
        self._rates: dict[int, list[tuple[Any, Any]]] = {}
        self._shown: dict[int, list[Any]] = {}
        self._loading: dict[int, dict[str, Any]] = {}
        self._plateaus: dict[int, ReduceLROnPlateau | None] = {}
        hooks = [hook for optimizer in optimizers for hook in step_hooks(optimizer)]
        if any(getattr(hook, "__func__", None) is LearnedScale._before_step for hook in hooks):
            raise ValueError("optimizers: one has a learned scale already")
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            optimizer.register_state_dict_post_hook(self._add_to_state_dict)
            optimizer.register_load_state_dict_pre_hook(self._take_from_state_dict)
            optimizer.register_load_state_dict_post_hook(self._load)
        for optimizer in optimizers:
            self._show(optimizer, self._given(optimizer))

    def __getstate__(self) -> dict[str, Any]:
        self._collect()
        bound = ("_optimizers", "_stepped", "_rates", "_shown", "_loading", "_plateaus")
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    # What was found.

    @property
    def values(self) -> dict[Hashable, float]:
        """κ as it is used, by the values of ``per``: the learning rates at the peak of the schedule."""
        return dict(self._held) or {key: state.value for key, state in self._states.items()}

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
        given = self._given(optimizer)
        return [self._use(self._key(group), rate) for group, rate in zip(optimizer.param_groups, given, strict=True)]

    def __repr__(self) -> str:
        return f"LearnedScale({self.describe()})"

    def _repr_html_(self) -> str:
        """Show the same in a notebook, as a table."""
        return as_html("LearnedScale", [as_table(self)])

    def hold(self) -> None:
        """End the search now: multiply the scales by the margin, hold them, and free what the search kept."""
        if not self.searching:
            return
        self._collect()
        for key, state in self._states.items():
            self._held[key] = held_scale(self._settings_of(key), state)
        self.searching = False
        self._ways.clear()
        log.info(self.describe())
        for key, value in self._held.items():
            if value >= self._settings_of(key).bounds[1]:
                log.warning(
                    "the learning rate of %r ended at its upper bound %g: the training loss asks for ever longer "
                    "steps, as where data are fit perfectly; give a rate, or check on held-out data",
                    key,
                    value,
                )

    def describe(self) -> str:
        """Say in one line what was found, or how far the search is."""
        rates = [f"{value:.2g}" + ("" if len(self._states) == 1 else f" ({key})") for key, value in self.values.items()]
        state = "so far" if self.searching else "found"
        return f"learning rate {state}: {', '.join(rates)} after {self.steps} steps"

    # A step. The hooks of all optimizers lead here.

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        changed = None
        self._undo_plateau(optimizer)
        self._note_peak()
        if self.searching:
            check_searchable(optimizer)
            changed = evaluate_closure(args, kwargs)
            found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler that leaves skipping to the step
            # Already prepared: by a step that failed, or by the one of a subclass, which calls this one.
            prepared = id(optimizer) in self._rates
            if not prepared and (found_inf is None or not bool(found_inf)):
                self._join_round(optimizer)
        rates: list[tuple[Any, Any]] = []
        for group, given in zip(optimizer.param_groups, self._given(optimizer), strict=True):
            group["lr"] = self._use(self._key(group), given, self._is_visible(group))
            rates.append((group["lr"], given))
        self._rates[id(optimizer)] = rates
        return changed

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        rates = self._rates.pop(id(optimizer), None)
        if rates is None:
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"] if self._is_visible(group) else ():
                    if param in self._ways:
                        self._ways[param].collect_visible_step(param, self._applied[self._key(group)])
        self._show(optimizer, [given for _, given in rates])

    def _join_round(self, optimizer: Optimizer) -> None:
        """The first optimizer of a round brings the search forward, for all of them."""
        if id(optimizer) in self._stepped:
            self._stepped.clear()
        if not self._stepped:
            self._advance()
        self._stepped.add(id(optimizer))

    def _advance(self) -> None:
        rate = max(float(given) for optimizer in self._all_optimizers() for given in self._given(optimizer))
        if rate == 0.0:
            return  # such as the step of torch.distributed.checkpoint, which only wants the state to be there
        settings = [self._settings_of(key) for key in self._states]
        fallen = rate < min(each.least_share for each in settings) * float(self._peak)
        enough = self.steps >= LEAST_STEPS and not any(state.climbing for state in self._states.values())
        if (fallen and enough) or self.steps >= max(each.steps for each in settings):
            self.hold()
            return
        self.steps += 1
        self._collect()
        with torch.no_grad():
            self._follow()

    def _follow(self) -> None:
        """Move the parameters to where the newest scales want them, and measure their ways by the gradients."""
        before, self._applied = self._applied, {key: state.value for key, state in self._states.items()}
        team = find_team(param for _, group in self._all_groups() for param in group["params"])
        measured: dict[Hashable, list[Tensor]] = {key: [] for key in self._states}
        for optimizer, group in self._all_groups():
            key = self._key(group)
            settings = self._settings_of(key)
            grad_scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler that leaves unscaling to the step
            for params in self._moving(group):
                ways = [self._ways[param] for param in params]
                along = follow(params, ways, before[key], self._applied[key], settings.swing, settings.window)
                if along is not None:
                    share = 1.0 if team is None else team.share(params[0])
                    along = along * (-share if group.get("maximize") else share)
                    measured[key].append(along if grad_scale is None else along / grad_scale)
        device = next((part.device for parts in measured.values() for part in parts), torch.device("cpu"))
        zero = torch.zeros((), device=device)
        # ∂f/∂log κ, but for the sign: as the scale climbs, what it meets there counts for more than what lies behind.
        by_scale = [before.get(key, 0.0) * sum((part.to(device) for part in measured[key]), zero) for key in measured]
        totals = torch.stack(by_scale)
        self._pending = Pending(list(measured), totals if team is None else team.sum(totals))

    def _moving(self, group: Group) -> Iterable[list[Tensor]]:
        """The parameters of a group that have a way, by what :func:`follow` wants alike. Ways of others begin."""
        params_by_key: dict[Hashable, list[Tensor]] = {}
        low = is_low(group)
        for param in group["params"]:
            if param in self._ways and self._ways[param].fits(param, low):
                grad_dtype = None if param.grad is None else param.grad.dtype
                params_by_key.setdefault((param.device, param.dtype, grad_dtype, spread_like(param)), []).append(param)
            elif param.grad is not None:  # the first one, or one in another dtype or on another device
                check_learnable([param])
                self._ways[param] = Way.begin(param, visible=low)
        return params_by_key.values()

    def _collect(self) -> None:
        """Learn from the hypergradients of the last step, which the device has had a whole step to compute."""
        pending, self._pending = self._pending, None
        for key, along in pending.read() if pending is not None else ():
            self._states[key] = learn(self._settings_of(key), self._states[key], -along)

    # Groups and their rates.

    def _all_optimizers(self) -> list[Optimizer]:
        return [optimizer for optimizer in (reference() for reference in self._optimizers) if optimizer is not None]

    def _all_groups(self) -> Iterator[tuple[Optimizer, Group]]:
        return ((optimizer, group) for optimizer in self._all_optimizers() for group in optimizer.param_groups)

    def _key(self, group: Group) -> Hashable:
        """The value of ``per``. A new one, of a group that came later, begins with the first scale."""
        key = "all" if self._per is None else self._per(group)
        if key not in self._states:
            first = next(iter(self._states))
            self._states[key] = replace(self._states[first], mean=0.0, square=0.0, taken=0)
            for scales in (self._applied, self._held):
                if scales:
                    scales[key] = scales[first]
        return key

    def _settings_of(self, key: Hashable) -> SearchSettings:
        settings = self._settings.get(key) if isinstance(self._settings, Mapping) else self._settings
        return SearchSettings() if settings is None else settings

    def _is_visible(self, group: Group) -> bool:
        return self.searching and is_low(group)

    def _use(self, key: Hashable, given: Any, visible: bool = False) -> Any:
        """The rate that is used for a given one; ``visible``: in the step of an optimizer with low precision."""
        peak = self._peak
        if not isinstance(peak, Tensor) and peak == 0.0:  # before the first step
            peak = max(float(rate) for optimizer in self._all_optimizers() for rate in self._given(optimizer)) or 1.0
        # During the search, where the parameters lie: what is learned in the middle of a round is for the next one.
        value = self._held.get(key) or self._applied.get(key) or self._states[key].value
        return (VISIBLE if visible else value) * (given / peak)

    def _given(self, optimizer: Optimizer) -> list[Any]:
        """The learning rates as they were given. Those of a step that failed stand in the groups as they were used."""
        given = [group["lr"] for group in optimizer.param_groups]
        for index, (used, before) in enumerate(self._rates.get(id(optimizer), ())):
            if given[index] is used:
                given[index] = before
        return [rate if isinstance(rate, Tensor) else given_rate(rate) for rate in given]

    def _undo_plateau(self, optimizer: Optimizer) -> None:
        """Let a rate that ReduceLROnPlateau made of the one in use count as made of the one that was given."""
        for group, shown in zip(optimizer.param_groups, self._shown.get(id(optimizer), ()), strict=False):
            rate = group["lr"]
            if isinstance(rate, (Tensor, ScaledRate)) or not isinstance(shown, ScaledRate):
                continue
            if id(optimizer) not in self._plateaus:
                self._plateaus[id(optimizer)] = plateau_of(optimizer)
            plateau = self._plateaus[id(optimizer)]
            if plateau is not None and shown > 0.0 and rate < shown:
                group["lr"] = rate / +shown * shown.given

    def _note_peak(self) -> None:
        for optimizer in self._all_optimizers():
            for rate in self._given(optimizer):
                self._peak = highest(self._peak, rate, on_host=self.searching)

    def _show(self, optimizer: Optimizer, given: list[Any]) -> None:
        for group, rate in zip(optimizer.param_groups, given, strict=True):
            use = partial(use_now, weakref.ref(self), self._key(group))
            group["lr"] = rate if isinstance(rate, Tensor) else ScaledRate(rate, use)
            group.setdefault(NAME, self.state_dict_of(self._key(group)))  # flattened state_dicts ask for its name
        self._shown[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]

    # Saving and loading.

    def state_dict_of(self, key: Hashable) -> dict[str, Any]:
        """Return all that is known of a scale, without what the search keeps of the parameters.

        Args:
            key: the value of ``per`` for the parameter groups of the scale.
        """
        return {
            **asdict(self._states[key]),
            "applied": self._applied.get(key, 0.0),
            "held": self._held.get(key, 0.0),
            "peak": float(self._peak),
            "steps": self.steps,
        }

    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._collect()
        groups: list[Group] = []
        rates = self._given(optimizer)
        for group, rate, packed in zip(optimizer.param_groups, rates, state_dict["param_groups"], strict=True):
            plain = {name: given_rate(value) for name, value in packed.items() if isinstance(value, ScaledRate)}
            groups.append({**packed, **plain, "lr": rate, NAME: self.state_dict_of(self._key(group))})
            for param, number in zip(group["params"], packed["params"], strict=True):
                if param in self._ways:
                    kept = state_dict["state"].get(number, {})
                    state_dict["state"][number] = {**kept, **self._ways[param].tensors()}
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
        self._loading[id(optimizer)] = {"state": ours, "param_groups": state_dict["param_groups"]}
        return {**state_dict, "state": theirs, "param_groups": groups}

    def _load(self, optimizer: Optimizer) -> None:
        saved = self._loading.pop(id(optimizer))
        self._rates.pop(id(optimizer), None)
        self._pending = None
        pairs = list(zip(optimizer.param_groups, saved["param_groups"], strict=True))
        for group, packed in pairs:
            for param, number in zip(group["params"], packed["params"], strict=True):
                kept = saved["state"].get(number)
                if kept:
                    self._ways[param] = Way.load(param, kept)
                else:
                    self._ways.pop(param, None)
            # Without it this is a checkpoint of the optimizer alone, and the search begins with what was loaded.
            scale = packed.get(NAME)
            if scale is not None:
                self._load_scale(self._key(group), scale)
        self._show(optimizer, self._given(optimizer))
        if self.searching and self.steps and not self._ways:
            warn(
                "the checkpoint is of a search for the learning rate that was under way, without what the search keeps "
                "of the parameters, which torch.distributed.checkpoint leaves out where it loads in place; the search "
                "goes on from the parameters as they are"
            )

    def _load_scale(self, key: Hashable, saved: Mapping[str, Any]) -> None:
        known = {field.name: saved[field.name] for field in fields(ScaleState) if field.name in saved}
        state = ScaleState(**known)
        self._states[key] = state if "recent" in saved else as_lively(state)  # an older checkpoint
        self._peak, self.steps, self.searching = saved["peak"], int(saved["steps"]), not saved["held"]
        if self.searching:
            self._held.clear()
            self._applied[key] = saved["applied"]
        else:
            self._held[key] = saved["held"]
            self._ways.clear()


def as_table(scale: LearnedScale) -> Table:
    """Return what a scale found, or how far its search is."""
    state = f"so far, after {scale.steps} steps" if scale.searching else f"found in {scale.steps} steps"
    return ("learning rate", state), [(str(kind), f"{value:.3g}") for kind, value in scale.values.items()]
