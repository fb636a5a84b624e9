"""A learning rate that shows what is used and remembers what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class ScaledRate(float):
    """The learning rate in use, as a float.

    Learning-rate schedulers either write a new rate or compute it from the one that they find. What they compute, by
    ``+ - * /``, is computed of the rate that was given: a schedule does not see the scale. Copied or pickled, it is a
    plain float again: the rate that was given.

    Args:
        given: what a user or a scheduler wrote.
        use: what is used for a given rate, now.

    >>> rate = ScaledRate(0.1, use=lambda given: 0.5 * given)
    >>> rate, rate * 0.5, (rate * 0.5).given
    (0.05, 0.025, 0.05)
    """

    given: float
    use: Callable[[float], float]

    def __new__(cls, given: float, use: Callable[[float], float]) -> ScaledRate:
        rate = super().__new__(cls, use(given))
        rate.given, rate.use = given, use
        return rate

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return float, (self.given,)


def given_rate(rate: float) -> float:
    """The rate that was given, of a scaled or of a plain one."""
    return rate.given if isinstance(rate, ScaledRate) else float(rate)


def _of_given(name: str) -> Callable[[ScaledRate, Any], Any]:
    operation = getattr(float, name)

    def compute(self: ScaledRate, other: Any) -> Any:
        result = operation(self.given, given_rate(other) if isinstance(other, float) else other)
        return result if result is NotImplemented else ScaledRate(result, self.use)

    compute.__name__ = name
    return compute


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv"):
    setattr(ScaledRate, f"__{_name}__", _of_given(f"__{_name}__"))

# A scheduler's state_dict may hold such a rate. As a pickle it is a call of float, which torch.load must allow.
torch.serialization.add_safe_globals([float])
