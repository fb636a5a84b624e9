"""Coefficients while they are learned: where they start, the box they stay in, and the rule that moves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, overload

import torch
from torch import Tensor

from mada_optim.arguments import is_number, to_python
from mada_optim.devices import move_numbers
from mada_optim.family import Coefficient, Family
from mada_optim.kernels.numbers import change_numbers
from mada_optim.scale.rule import MEAN_DECAY, SQUARE_DECAY

HyperLR = float | Mapping[str, float] | None
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class CoefficientSettings:
    """The choices a user can make about a set of coefficients, checked and completed.

    Args:
        start: value before the first step, for every coefficient of the family.
        hyper_lr: step size for every coefficient; 0.0 where it is frozen.
        bounds: box (low, high) for every coefficient.
        special: those frozen at a value that switches off part of the update, see :class:`Coefficient`.
    """

    start: dict[str, float]
    hyper_lr: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    special: dict[str, float]


def resolve_settings(
    family: Family, start: Mapping[str, float], hyper_lr: HyperLR, bounds: Bounds | None
) -> CoefficientSettings:
    """Complete what the user gave with the family's defaults, and check all of it.

    Args:
        family: whose coefficients they are.
        start: initial values; what is not named starts at its default.
        hyper_lr: None: the family's step sizes; a number: one for all; a mapping: what is not named is frozen.
        bounds: boxes to use instead of the family's, by name.

    Raises:
        ValueError: names the argument, the value and what is allowed.
        TypeError: an argument is neither of the kinds above.

    >>> from mada_optim.family import MADAFamily
    >>> resolve_settings(MADAFamily(), {"rho": 0.5}, {"rho": 0.1}, None).hyper_lr["beta1"]
    0.0
    """
    known = {coefficient.name: coefficient for coefficient in family.coefficients}
    start, hyper_lr, bounds = to_python(start), to_python(hyper_lr), to_python(bounds)
    _check_names("coefficient", start, known)
    if bounds is not None and not isinstance(bounds, Mapping):
        raise TypeError(f"bounds must be None or a mapping from name to (low, high), got {bounds!r}")
    _check_names("bounds", bounds or {}, known)
    step_sizes = _resolve_hyper_lr(known, hyper_lr)
    boxes = {name: _box(coefficient, (bounds or {}).get(name)) for name, coefficient in known.items()}
    values = {name: start.get(name, coefficient.default) for name, coefficient in known.items()}
    for name, value in values.items():
        check_value(known[name], value, boxes[name] if step_sizes[name] > 0.0 else None)
    values = {name: float(value) for name, value in values.items()}
    special = {
        name: value for name, value in values.items() if step_sizes[name] == 0.0 and value in known[name].special
    }
    return CoefficientSettings(values, step_sizes, boxes, special)


def check_value(coefficient: Coefficient, value: Any, box: tuple[float, float] | None = None) -> None:
    """Raise ValueError where a coefficient cannot have a value.

    Args:
        coefficient: whose value it is.
        value: what the user gave.
        box: where the coefficient is learned; None: it is frozen, and all of its domain is allowed.
    """

    def is_within(interval: tuple[float, float]) -> bool:
        return is_number(value) and interval[0] <= value <= interval[1]

    name, (low, high) = coefficient.name, box or coefficient.domain
    if is_within((low, high)):
        return
    why = "its domain" if box is None else "the box in which it is learned"
    if box is not None and is_within(coefficient.domain):
        wider = {name: (min(low, value), max(high, value))}
        why += f" (to start there, pass bounds={wider}, or freeze {name} by hyper_lr)"
    raise ValueError(f"{name} must be a number in [{low}, {high}], {why}, got {value!r}")


def _check_names(argument: str, given: Mapping[str, Any], known: Mapping[str, Coefficient]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{argument}: unknown name {unknown[0]!r}; this family has {', '.join(known)}")


def _resolve_hyper_lr(known: Mapping[str, Coefficient], hyper_lr: HyperLR) -> dict[str, float]:
    if hyper_lr is None:
        return {name: coefficient.hyper_lr for name, coefficient in known.items()}
    if isinstance(hyper_lr, Mapping):
        _check_names("hyper_lr", hyper_lr, known)
        step_sizes = {name: hyper_lr.get(name, 0.0) for name in known}
    else:
        step_sizes = dict.fromkeys(known, hyper_lr)
    for name, value in step_sizes.items():
        if not is_number(value) or value < 0.0:
            raise ValueError(f"hyper_lr of {name} must be a finite number >= 0, got {value!r}")
    return {name: float(value) for name, value in step_sizes.items()}


def _box(coefficient: Coefficient, bounds: Any) -> tuple[float, float]:
    if bounds is None:
        return coefficient.box
    low, high = coefficient.domain
    if not (
        isinstance(bounds, (tuple, list))
        and len(bounds) == 2
        and all(is_number(bound) for bound in bounds)
        and low <= bounds[0] <= bounds[1] <= high
    ):
        raise ValueError(
            f"bounds of {coefficient.name} must be (low, high) with {low} <= low <= high <= {high}, got {bounds!r}"
        )
    return float(bounds[0]), float(bounds[1])


@dataclass(frozen=True)
class LearnedTensors:
    """What learning changes.

    Args:
        values: coefficients, shape (K,), float64 (float32 where the device has no float64).
        momentum: b, or the running mean of h; ``square``: the running mean of h²; both of the same shape and dtype.
        taken: how many hypergradients were used, 0-dimensional int64 tensor.
    """

    values: Tensor
    momentum: Tensor
    square: Tensor
    taken: Tensor


@dataclass(frozen=True)
class LearningRule:
    """Projected gradient descent with momentum and clipping: b ← μ b + clip(h), then q ← Π(q - α b).

    Args:
        momentum: μ, in [0, 1).
        clip: each |h| is cut to this before it is used; may be infinite.
        warmup: number of optimizer steps that use the initial coefficients.
        every: a hypergradient is taken before each ``every``-th optimizer step.
    """

    momentum: float
    clip: float
    warmup: int
    every: int

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"hyper_momentum must be a number in [0, 1), got {self.momentum!r}")
        if not isinstance(self.clip, Real) or not self.clip > 0.0:
            raise ValueError(f"hyper_clip must be a number > 0, got {self.clip!r}")
        for name, value, low in (("hyper_warmup", self.warmup, 0), ("hyper_every", self.every, 1)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")

    @overload
    def due(self, steps: int) -> bool: ...

    @overload
    def due(self, steps: Tensor) -> Tensor: ...

    def due(self, steps: int | Tensor) -> bool | Tensor:
        """Return whether a hypergradient is used before the next step.

        Args:
            steps: completed so far.

        >>> rule = LearningRule(momentum=0.0, clip=10.0, warmup=50, every=10)
        >>> [t for t in range(80) if rule.due(t)]
        [50, 60, 70]
        """
        return (steps >= max(self.warmup, 1)) & ((steps - self.warmup) % self.every == 0)

    def learn(
        self,
        learned: LearnedTensors,
        skipped: Tensor,
        hypergradient: Tensor,
        coefficients: Sequence[Coefficient],
        step_sizes: Sequence[float],
        boxes: Sequence[tuple[float, float]],
        due: bool | Tensor = True,
        fused: bool = False,
    ) -> None:
        """Move the coefficients in place, without waiting for the device.

        A hypergradient with a NaN or an infinity changes nothing but ``skipped``, which counts it. Coefficients that
        are ``normalized`` are not clipped: they move by α times the running mean of h over its root mean square.

        Args:
            learned: changed in place.
            skipped: 0-dimensional int64 tensor.
            hypergradient: shape (K,), in the precision and on the device of the coefficients.
            coefficients: what is known of each.
            step_sizes: α for each coefficient, 0 where it is frozen.
            boxes: (low, high) for each coefficient.
            due: False: nothing changes.
            fused: in one launch, see :func:`change_numbers`.
        """
        if due is False:
            return
        dtype, device = hypergradient.dtype, hypergradient.device
        tensors = [getattr(learned, item.name) for item in fields(LearnedTensors)]
        tensors += [skipped, hypergradient, *_on_device(tuple(step_sizes), tuple(boxes), dtype, device)]
        tensors += [_number(x, dtype, device) for x in (self.momentum, self.clip, due)]
        if any(coefficient.normalized for coefficient in coefficients):
            tensors.append(_are_normalized(tuple(coefficients), device))
        if fused:
            change_numbers(_descend, *tensors)
        else:
            _descend(*tensors)


def _descend(
    values: Tensor,
    momentum: Tensor,
    square: Tensor,
    taken: Tensor,
    skipped: Tensor,
    h: Tensor,
    alpha: Tensor,
    low: Tensor,
    high: Tensor,
    mu: Tensor,
    clip: Tensor,
    due: Tensor,
    normalized: Tensor | None = None,
) -> None:
    """:meth:`LearningRule.learn`, all of whose arguments are tensors. ``normalized``: which coefficients are."""
    finite = torch.isfinite(h).all()
    descent = mu * momentum + torch.minimum(torch.maximum(h, -clip), clip)
    before = LearnedTensors(values, momentum, square, taken)
    new = LearnedTensors(values - alpha * descent, descent, square, taken + 1)
    if normalized is not None:
        new = _normalize(before, new, h, alpha, normalized)
    moved = torch.minimum(torch.maximum(new.values, low), high)
    new = replace(new, values=torch.where(alpha > 0, moved, values))
    for item in fields(LearnedTensors):
        tensor = getattr(before, item.name)
        tensor.copy_(torch.where(finite & due, getattr(new, item.name), tensor))
    skipped.copy_(torch.where(~finite & due, skipped + 1, skipped))


def _normalize(
    before: LearnedTensors, plain: LearnedTensors, h: Tensor, alpha: Tensor, normalized: Tensor
) -> LearnedTensors:
    """What ``plain`` gradient descent makes of ``before``, but for coefficients that are normalized."""
    taken = plain.taken.to(h.dtype)
    mean = MEAN_DECAY * before.momentum + (1 - MEAN_DECAY) * h
    square = SQUARE_DECAY * before.square + (1 - SQUARE_DECAY) * h * h
    size = (square / (1 - SQUARE_DECAY**taken)).sqrt()
    ratio = torch.where(size > 0, mean / (1 - MEAN_DECAY**taken) / size, 0.0)
    values = torch.where(normalized, before.values - alpha * ratio, plain.values)
    return LearnedTensors(values, torch.where(normalized, mean, plain.momentum), square, plain.taken)


def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    if isinstance(value, Tensor):
        return move_numbers(value, device)
    return _constant(value, torch.bool if isinstance(value, bool) else dtype, device)


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _on_device(
    step_sizes: tuple[float, ...], boxes: tuple[tuple[float, float], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes, lower and upper bounds, copied to the device once: each copy waits for it."""
    rows = (step_sizes, *zip(*boxes, strict=True))
    alpha, low, high = (torch.tensor(row, dtype=dtype, device="cpu").to(device) for row in rows)
    return alpha, low, high


@lru_cache(maxsize=64)
def _are_normalized(coefficients: tuple[Coefficient, ...], device: torch.device) -> Tensor:
    return torch.tensor([coefficient.normalized for coefficient in coefficients], device="cpu").to(device)
