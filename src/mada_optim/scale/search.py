"""The search for the scales: what it knows of them, what it keeps of the parameters, and one step of it.

It sees parameter groups, each with the kind whose scale it shares. Of optimizers and schedules it knows nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mada_optim.scale.rule import ScaleState, SearchSettings, as_lively, held_scale, learn
from mada_optim.scale.way import LOW_PRECISION, Way, follow
from mada_optim.tensors.distributed import check_learnable, find_team, spread_like

Group = dict[str, Any]
log = logging.getLogger("mada_optim")
LEAST_STEPS = 30
"""Steps after which the search may end because the schedule has fallen."""


@dataclass(frozen=True)
class Member:
    """A parameter group that takes part in a search.

    Args:
        kind: of the scale that it has.
        group: the parameter group.
        grad_scale: of a GradScaler that leaves unscaling to the step, which divides the gradients by it; or None.
    """

    kind: Hashable
    group: Group
    grad_scale: Tensor | None


class Search:
    """Scales κ, one for each kind of parameter group, that are learned and then held.

    Args:
        kinds: of the parameter groups.
        settings: for all kinds, or by kind; None: the defaults.
    """

    def __init__(
        self, kinds: Iterable[Hashable], settings: SearchSettings | Mapping[Any, SearchSettings] | None
    ) -> None:
        self._settings = settings
        self.running = True
        """Whether scales are still learned."""
        self.steps = 0
        """Steps so far."""
        self._states = {kind: ScaleState(math.log(self._settings_of(kind).start)) for kind in kinds}
        self._applied: dict[Hashable, float] = {}  # at which scales the parameters lie, while it runs
        self._held: dict[Hashable, float] = {}
        self._ways: dict[Tensor, Way] = {}
        self._pending: _Pending | None = None

    # The scales.

    @property
    def kinds(self) -> list[Hashable]:
        """The kinds of parameter groups, each with a scale of its own."""
        return list(self._states)

    @property
    def values(self) -> dict[Hashable, float]:
        """κ by kind: those that are held, or as they were learned so far."""
        return dict(self._held) or {kind: state.value for kind, state in self._states.items()}

    def in_use(self, kind: Hashable) -> float:
        """κ of a kind where the parameters lie. What is learned in the middle of a round is for the next one."""
        return self._held.get(kind) or self._applied.get(kind) or self._states[kind].value

    def add(self, kind: Hashable) -> None:
        """Begin a scale for a kind that came later, where the first scale is; one that is known stays as it is."""
        if kind in self._states:
            return
        first = next(iter(self._states))
        self._states[kind] = replace(self._states[first], mean=0.0, square=0.0, taken=0)
        for scales in (self._applied, self._held):
            if scales:
                scales[kind] = scales[first]

    def hold(self, scales: Mapping[Hashable, float] | None = None) -> None:
        """End the search, and free what it kept.

        Args:
            scales: that are held, by kind. None: those that were learned, times the margin.
        """
        self.collect()
        if scales is None:
            scales = {kind: held_scale(self._settings_of(kind), state) for kind, state in self._states.items()}
        self._held = dict(scales)
        self.running = False
        self._ways.clear()

    def warn_of_bounds(self) -> None:
        """Log which scales ended at their upper bound."""
        for kind, value in self._held.items():
            if value >= self._settings_of(kind).bounds[1]:
                log.warning(
                    "the learning rate of %r ended at its upper bound %g: the training loss asks for ever longer "
                    "steps, as where data are fit perfectly; give a rate, or check on held-out data",
                    kind,
                    value,
                )

    def _settings_of(self, kind: Hashable) -> SearchSettings:
        settings = self._settings.get(kind) if isinstance(self._settings, Mapping) else self._settings
        return SearchSettings() if settings is None else settings

    # A step.

    def is_over(self, rate: float, peak: float) -> bool:
        """Whether the search ends, which it does early where the schedule has fallen.

        Args:
            rate: the highest learning rate that is given now.
            peak: the highest so far.
        """
        settings = [self._settings_of(kind) for kind in self._states]
        fallen = rate < min(each.least_share for each in settings) * peak
        enough = self.steps >= LEAST_STEPS and not any(state.climbing for state in self._states.values())
        return (fallen and enough) or self.steps >= max(each.steps for each in settings)

    def advance(self, members: Sequence[Member]) -> None:
        """Learn from the last step, move the parameters to where the scales want them, and measure their ways.

        A parameter that has no gradient for a step moves as well. One that was frozen does not.

        Args:
            members: all groups, with the gradients of the step to come. Their parameters are changed.
        """
        self.steps += 1
        self.collect()
        with torch.no_grad():
            self._pending = _Pending(*self._follow(members))

    def collect(self) -> None:
        """Learn from the hypergradients of the last step, which the device has had a whole step to compute."""
        pending, self._pending = self._pending, None
        for kind, along in pending.read() if pending is not None else ():
            self._states[kind] = learn(self._settings_of(kind), self._states[kind], -along)

    def collect_visible_steps(self, kind: Hashable, group: Group) -> None:
        """Bring parameters in low precision back from the visible step that their optimizer took; see :class:`Way`."""
        with torch.no_grad():
            for param in group["params"]:
                if param in self._ways:
                    self._ways[param].collect_visible_step(param, self._applied[kind])

    def _follow(self, members: Sequence[Member]) -> tuple[list[Hashable], Tensor]:
        """Return the kinds, and -∂f/∂log κ of each."""
        before, self._applied = self._applied, {kind: state.value for kind, state in self._states.items()}
        team = find_team(param for member in members for param in member.group["params"])
        measured: dict[Hashable, list[Tensor]] = {kind: [] for kind in self._states}
        for member in members:
            kind, group = member.kind, member.group
            settings = self._settings_of(kind)
            for params in self._moving(group):
                ways = [self._ways[param] for param in params]
                along = follow(params, ways, before[kind], self._applied[kind], settings.swing, settings.window)
                if along is not None:
                    share = 1.0 if team is None else team.share(params[0])
                    along = along * (-share if group.get("maximize") else share)
                    measured[kind].append(along if member.grad_scale is None else along / member.grad_scale)
        device = next((part.device for parts in measured.values() for part in parts), torch.device("cpu"))
        zero = torch.zeros((), device=device)
        # By log κ: as the scale climbs, what it meets there counts for more than what lies behind.
        by_scale = [
            before.get(kind, 0.0) * sum((part.to(device) for part in parts), zero) for kind, parts in measured.items()
        ]
        totals = torch.stack(by_scale)
        return list(measured), totals if team is None else team.sum(totals)

    def _moving(self, group: Group) -> Iterable[list[Tensor]]:
        """The parameters of a group that have a way, by what :func:`follow` wants alike. Ways of others begin."""
        params_by_key: dict[Hashable, list[Tensor]] = {}
        low = is_low(group)
        for param in group["params"]:
            if not param.requires_grad:  # frozen since: it stays where it is
                self._ways.pop(param, None)
            elif param in self._ways and self._ways[param].fits(param, low):
                grad_dtype = None if param.grad is None else param.grad.dtype
                params_by_key.setdefault((param.device, param.dtype, grad_dtype, spread_like(param)), []).append(param)
            elif param.grad is not None:  # the first one, or one in another dtype or on another device
                check_learnable([param])
                self._ways[param] = Way.begin(param, visible=low)
        return params_by_key.values()

    # Saving and loading.

    def state_dict_of(self, kind: Hashable) -> dict[str, Any]:
        """Return all that is known of a scale, without the ways."""
        return {
            **asdict(self._states[kind]),
            "applied": self._applied.get(kind, 0.0),
            "held": self._held.get(kind, 0.0),
            "steps": self.steps,
        }

    def load_scale(self, kind: Hashable, saved: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict_of` returned."""
        known = {field.name: saved[field.name] for field in fields(ScaleState) if field.name in saved}
        state = ScaleState(**known)
        self._states[kind] = state if "recent" in saved else as_lively(state)  # an older checkpoint
        self.steps, self.running = int(saved["steps"]), not saved["held"]
        if self.running:
            self._held.clear()
            self._applied[kind] = saved["applied"]
        else:
            self._held[kind] = saved["held"]
            self._ways.clear()

    @property
    def has_ways(self) -> bool:
        """Whether anything is kept of the parameters."""
        return bool(self._ways)

    def way_of(self, param: Tensor) -> Way | None:
        """Return what is kept of a parameter."""
        return self._ways.get(param)

    def load_ways(self, tensors: Mapping[Tensor, Mapping[str, Tensor] | None]) -> None:
        """Load what is kept of parameters, by name, or forget it; what was measured last is forgotten, too."""
        self._pending = None
        for param, kept in tensors.items():
            if kept:
                self._ways[param] = Way.load(param, kept)
            else:
                self._ways.pop(param, None)


class _Pending:
    """Hypergradients on their way from the device to the host, for which the program does not wait."""

    def __init__(self, kinds: list[Hashable], along: Tensor) -> None:
        self._kinds = kinds
        self._event: torch.cuda.Event | None = None
        if along.device.type == "cuda":
            self._along = torch.empty(along.shape, dtype=along.dtype, pin_memory=True)
            self._along.copy_(along, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._along = along.cpu()

    def read(self) -> list[tuple[Hashable, float]]:
        if self._event is not None:
            self._event.synchronize()
        return list(zip(self._kinds, self._along.tolist(), strict=True))


def is_low(group: Group) -> bool:
    """Whether small steps of a parameter in the group would be lost to rounding."""
    return any(param.dtype in LOW_PRECISION for param in group["params"])
