"""The schedule: learning rates as they are given, where parameter groups show those in use."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mada_optim.scale.rate import ScaledRate, given_rate

Group = dict[str, Any]


class Schedule:
    """The learning rates that are given to optimizers: shares η of the highest so far.

    Args:
        optimizers: the optimizers. They keep the schedule, by their hooks, and not the other way round.
        peak: the highest rate so far; 0 before the first step. A tensor where rates are on a device.
    """

    def __init__(self, optimizers: Sequence[Optimizer], peak: float | Tensor = 0.0) -> None:
        self.peak = peak
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        # By the optimizers' identity. In a step each group's rate in use and the given one; else what groups show.
        self._in_step: dict[int, list[tuple[Any, Any]]] = {}
        self._shown: dict[int, list[Any]] = {}

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are still there."""
        return [optimizer for optimizer in (reference() for reference in self._optimizers) if optimizer is not None]

    def given(self, optimizer: Optimizer) -> list[Any]:
        """The learning rates as they were given.

        Those of a step that failed stand in the groups as they were used. What ReduceLROnPlateau made of a rate in use
        counts as made of the one that was given.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        for index, (used, before) in enumerate(self._in_step.get(id(optimizer), ())):
            if rates[index] is used:
                rates[index] = before
        shown = self._shown.get(id(optimizer), ())
        for index, was in enumerate(shown[: len(rates)]):
            rate = rates[index]
            if isinstance(was, ScaledRate) and rate is not was and was.was_reduced_to(rate):
                rates[index] = rate / +was * was
        return [rate if isinstance(rate, Tensor) else given_rate(rate) for rate in rates]

    def highest_given(self) -> float:
        """The highest of the rates that are given now."""
        return max(float(rate) for optimizer in self.optimizers for rate in self.given(optimizer))

    def share(self, given: Any) -> Any:
        """What share of the peak a given rate is."""
        peak = self.peak
        if not isinstance(peak, Tensor) and peak == 0.0:  # before the first step
            peak = self.highest_given() or 1.0
        return given / peak

    def note_peak(self, on_host: bool) -> None:
        """Take up the rates that are given now.

        Args:
            on_host: whether the peak must be a number, also where the program has to wait for a rate.
        """
        for optimizer in self.optimizers:
            for rate in self.given(optimizer):
                self.raise_peak(rate, on_host)

    def raise_peak(self, rate: Any, on_host: bool) -> None:
        """Take up one rate; the peak is a tensor, changed in place, where one is on a device for which not to wait."""
        if isinstance(rate, Tensor) and (on_host or rate.device.type == "cpu"):
            rate = float(rate)
        peak = self.peak
        if not isinstance(rate, Tensor) and not math.isfinite(rate):
            return
        if isinstance(peak, Tensor):
            peak.copy_(torch.maximum(peak, torch.as_tensor(rate, dtype=peak.dtype, device=peak.device).reshape(())))
        elif isinstance(rate, Tensor):
            self.peak = rate.detach().reshape(()).clamp(min=peak)
        else:
            self.peak = max(peak, float(rate))

    # A step, and between steps.

    def is_in_step(self, optimizer: Optimizer) -> bool:
        """Whether a step has begun: one that failed, or that of a subclass, which calls this one."""
        return id(optimizer) in self._in_step

    def begin_step(self, optimizer: Optimizer, use: Callable[[Group, Any], Any]) -> None:
        """Put the rates in use into the parameter groups.

        Args:
            use: from a group and its given rate to the rate in use.
        """
        rates: list[tuple[Any, Any]] = []
        for group, given in zip(optimizer.param_groups, self.given(optimizer), strict=True):
            group["lr"] = use(group, given)
            rates.append((group["lr"], given))
        self._in_step[id(optimizer)] = rates

    def show(self, optimizer: Optimizer, use_of: Callable[[Group], Callable[[float], float]]) -> None:
        """End the step, if there is one, and let parameter groups show the rates in use, which remember the given ones.

        Args:
            use_of: for a group, what is used for a given rate. Tensors stay what was given.
        """
        in_step = self._in_step.pop(id(optimizer), None)
        given = self.given(optimizer) if in_step is None else [before for _, before in in_step]
        for group, rate in zip(optimizer.param_groups, given, strict=True):
            group["lr"] = rate if isinstance(rate, Tensor) else ScaledRate(rate, use_of(group))
        self._shown[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]

    def forget_step(self, optimizer: Optimizer) -> None:
        """Take the rates in the groups for given ones: they were loaded."""
        self._in_step.pop(id(optimizer), None)
