"""What a user may choose about coefficients: where they start, their step sizes, the boxes in which they stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mada_optim.arguments import is_number, to_python
from mada_optim.families import Coefficient, Family

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

    >>> from mada_optim.families import MADAFamily
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
        name: value for name, value in values.items() if step_sizes[name] == 0.0 and value in known[name].frozen_at
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
