"""A learning rate that shows what is used and remembers what was given."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


class ScaledRate(float):
    """The learning rate in use, as a float that remembers the rate that was given.

    Learning-rate schedulers either write a new rate or compute one from the rate that they find. What ``+ - * / **``,
    ``abs`` and ``round`` make of this one remembers the same of the rate that was given, so a schedule does not see the
    scale. As numbers the results are what they are for floats, and ``float`` returns a plain one. Copies and pickles
    are the rate that was given, as plain floats.

    Args:
        given: what a user or a scheduler wrote.
        use: what is used for a given rate now, a multiple of it.
        value: None: ``use(given)``.

    >>> rate = ScaledRate(0.1, use=lambda given: 0.5 * given)
    >>> rate, rate * 0.5, (rate * 0.5).given
    (0.05, 0.025, 0.05)
    """

    given: float
    use: Callable[[float], float]
    plateau: Callable[[], ReduceLROnPlateau | None] = staticmethod(lambda: None)
    """The scheduler that read this rate as a plain float, in place of which it writes another one."""
    __array_priority__ = -1.0  # NumPy's scalars leave products to this class then; arrays do not

    def __new__(cls, given: float, use: Callable[[float], float], value: float | None = None) -> ScaledRate:
        rate = super().__new__(cls, use(given) if value is None else value)
        rate.given, rate.use = given, use
        return rate

    def __float__(self) -> float:
        # Nothing else leads from an optimizer to its ReduceLROnPlateau.
        caller = sys._getframe(1)
        if caller.f_code.co_name == "_reduce_lr":
            reader = caller.f_locals.get("self")
            if isinstance(reader, ReduceLROnPlateau):
                self.plateau = weakref.ref(reader)
        return +self

    def was_reduced_to(self, rate: float) -> bool:
        """Whether a ReduceLROnPlateau wrote a rate in place of this one. It keeps the very number that it wrote."""
        plateau = self.plateau()
        return plateau is not None and any(rate is last for last in plateau._last_lr)

    def __round__(self, ndigits: SupportsIndex | None = None) -> Any:
        if ndigits is None:
            return round(+self)
        return ScaledRate(round(self.given, ndigits), self.use, round(+self, ndigits))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return float, (self.given,)


def given_rate(rate: Any) -> float:
    """The rate that was given, of a scaled or of a plain one."""
    return rate.given if isinstance(rate, ScaledRate) else float(rate)


def _remembering(name: str, linear: bool) -> Callable[[ScaledRate, Any], Any]:
    operation = getattr(float, name)

    def compute(self: ScaledRate, other: Any) -> Any:
        if not isinstance(other, Real):
            return NotImplemented
        given = operation(self.given, given_rate(other))
        # A multiple follows the scale: of rates that a scheduler read long ago, too.
        follows = linear and not isinstance(other, ScaledRate)
        return ScaledRate(given, self.use, None if follows else operation(+self, float(other)))

    compute.__name__ = name
    return compute


def _remembering_sign(name: str) -> Callable[[ScaledRate], ScaledRate]:
    operation = getattr(float, name)

    def compute(self: ScaledRate) -> ScaledRate:
        return ScaledRate(operation(self.given), self.use, operation(+self))

    compute.__name__ = name
    return compute


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "pow"):
    setattr(ScaledRate, f"__{_name}__", _remembering(f"__{_name}__", linear=_name in ("mul", "rmul", "truediv")))
for _name in ("neg", "abs"):
    setattr(ScaledRate, f"__{_name}__", _remembering_sign(f"__{_name}__"))

# A scheduler's state_dict may hold such a rate. As a pickle it is a call of float, which torch.load must allow.
torch.serialization.add_safe_globals([float])
