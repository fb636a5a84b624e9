"""Coefficients while they are learned: where they start, the box they stay in, and the rule that moves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mada_optax.family import Coefficient, Family

Number = float | jax.Array
HyperLR = Number | Mapping[str, Number] | None
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class CoefficientSettings:
    """The choices of a user about the coefficients of a family, checked and completed.

    An entry that is an array, such as one of ``optax.inject_hyperparams``, may change from step to step. It is not
    checked, and a coefficient with such a step size counts as learned.

    Args:
        start: value before the first step, for every coefficient; of frozen ones at every step.
        hyper_lr: step size for every coefficient, 0.0 where it is frozen.
        bounds: box (low, high) for every coefficient.
    """

    start: dict[str, Number]
    hyper_lr: dict[str, Number]
    bounds: dict[str, tuple[float, float]]
    special: dict[str, float]

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the coefficients that are learned."""
        return tuple(name for name, step_size in self.hyper_lr.items() if not _is_zero(step_size))


def resolve_settings(
    family: Family, start: Mapping[str, Number], hyper_lr: HyperLR, bounds: Bounds | None
) -> CoefficientSettings:
    """Complete what the user gave with the family's defaults, and check all of it.

    Args:
        family: whose coefficients they are.
        start: initial values; what is not named starts at its default.
        hyper_lr: None: the family's step sizes; a number: one for all; a mapping: what is not named is frozen.
        bounds: boxes to use instead of the family's, by name.

    Raises:
        ValueError: names the argument, the value and what is allowed.
    """
    known = {coefficient.name: coefficient for coefficient in family.coefficients}
    for argument, names in (("start", start), ("bounds", bounds or {})):
        _check_names(argument, names, known)
    step_sizes = _resolve_hyper_lr(known, hyper_lr)
    boxes = {name: _box(coefficient, (bounds or {}).get(name)) for name, coefficient in known.items()}
    values = {name: start.get(name, coefficient.default) for name, coefficient in known.items()}
    for name, value in values.items():
        frozen = _is_zero(step_sizes[name])
        _check_value(known[name], value, known[name].domain if frozen else boxes[name], frozen)
    special = {
        name: float(value)
        for name, value in values.items()
        if _is_zero(step_sizes[name]) and is_number(value) and value in known[name].frozen_at
    }
    return CoefficientSettings(values, step_sizes, boxes, special)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of Python, which can be checked; arrays may be traced."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_zero(value: Number) -> bool:
    return is_number(value) and bool(value == 0.0)


def _check_names(argument: str, names: Mapping[str, Any], known: Mapping[str, Coefficient]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: unknown name {name!r}; this family has {', '.join(known)}")


def _check_value(coefficient: Coefficient, value: Number, interval: tuple[float, float], frozen: bool) -> None:
    low, high = interval
    if isinstance(value, jax.Array) or (is_number(value) and low <= value <= high):
        return
    why = "its domain" if frozen else "the box in which it is learned; widen it by bounds, or freeze it by hyper_lr"
    raise ValueError(f"{coefficient.name} must be a number in [{low}, {high}], {why}, got {value!r}")


def _resolve_hyper_lr(known: Mapping[str, Coefficient], hyper_lr: HyperLR) -> dict[str, Number]:
    if hyper_lr is None:
        return {name: coefficient.hyper_lr for name, coefficient in known.items()}
    if isinstance(hyper_lr, Mapping):
        _check_names("hyper_lr", hyper_lr, known)
        step_sizes = {name: hyper_lr.get(name, 0.0) for name in known}
    else:
        step_sizes = dict.fromkeys(known, hyper_lr)
    for name, value in step_sizes.items():
        if not isinstance(value, jax.Array) and not (is_number(value) and value >= 0.0):
            raise ValueError(f"hyper_lr of {name} must be a finite number >= 0, got {value!r}")
    return step_sizes


def _box(coefficient: Coefficient, bounds: Any) -> tuple[float, float]:
    if bounds is None:
        return coefficient.box
    low, high = coefficient.domain
    pair = tuple(bounds) if isinstance(bounds, (tuple, list)) else ()
    if not (len(pair) == 2 and all(map(is_number, pair)) and low <= pair[0] <= pair[1] <= high):
        raise ValueError(
            f"bounds of {coefficient.name} must be (low, high) with {low} <= low <= high <= {high}, got {bounds!r}"
        )
    return pair


@dataclass(frozen=True)
class LearningRule:
    """Projected gradient descent with momentum and clipping: b ← μ b + clip(h), then q ← Π(q - α b).

    Args:
        momentum: μ, in [0, 1).
        clip: each |h| is cut to this before it is used; may be infinite.
        warmup: number of steps that use the initial coefficients.
        every: a hypergradient is taken before each ``every``-th step.
    """

    momentum: Number
    clip: Number
    warmup: int | jax.Array
    every: int | jax.Array

    def __post_init__(self) -> None:
        allowed = {
            "momentum": (lambda x: 0.0 <= x < 1.0, "a number in [0, 1)"),
            "clip": (lambda x: x > 0.0, "a number > 0"),
            "warmup": (lambda x: isinstance(x, int) and x >= 0, "an integer >= 0"),
            "every": (lambda x: isinstance(x, int) and x >= 1, "an integer >= 1"),
        }
        for name, (is_allowed, what) in allowed.items():
            value = getattr(self, name)
            is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not isinstance(value, jax.Array) and not (is_real and is_allowed(value)):  # type: ignore[no-untyped-call]
                raise ValueError(f"hyper_{name} must be {what}, got {value!r}")

    def due(self, steps: int | jax.Array) -> jax.Array:
        """Whether a hypergradient is used before the next step, after ``steps`` completed ones.

        >>> rule = LearningRule(momentum=0.0, clip=10.0, warmup=50, every=10)
        >>> [t for t in range(80) if rule.due(t)]
        [50, 60, 70]
        """
        done = jnp.asarray(steps)
        return (done >= jnp.maximum(self.warmup, 1)) & ((done - self.warmup) % self.every == 0)

    def learn(
        self,
        values: jax.Array,
        momentum: jax.Array,
        hypergradient: jax.Array,
        step_sizes: jax.Array,
        low: jax.Array,
        high: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Move the coefficients. A hypergradient with a NaN or an infinity changes nothing.

        Args:
            values, momentum, hypergradient, step_sizes, low, high: one number for each coefficient.

        Returns:
            Values, momentum, and whether the hypergradient was used.
        """
        finite = jnp.isfinite(hypergradient).all()
        descent = self.momentum * momentum + jnp.clip(hypergradient, -self.clip, self.clip)
        moved = jnp.clip(values - step_sizes * descent, low, high)
        used = finite & (step_sizes > 0)
        return jnp.where(used, moved, values), jnp.where(finite, descent, momentum), finite
