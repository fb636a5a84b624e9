"""When AVGrad's effective learning rate η/(√V_t + ε) does not increase: Proposition 1 of ``docs/theory.md``.

The functions use nothing but arithmetic and comparison, elementwise: floats, exact fractions and tensors all serve.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Fraction, Tensor)


def mean_factor(beta2: Number, step: int, bias_correction: bool = True) -> Any:
    """φ_t, by which v̄_{t-1} is multiplied in Proposition 1 (equation 5).

    ``1`` without bias correction; with it ``1 + t β2^(t-1) (1-β2)/(1-β2^(t-1))``, which falls to 1 as t grows.

    Args:
        beta2: β2 in [0, 1).
        step: t >= 2.
        bias_correction: whether V_t = v̄_t/(1-β2^t), as in :class:`mada_optim.AVGrad`, or V_t = v̄_t.

    Raises:
        ValueError: there is no step before ``step``, or β2 is not in [0, 1).

    >>> mean_factor(0.5, 2), mean_factor(0.5, 2, bias_correction=False)
    (2.0, 1)
    """
    if step < 2:
        raise ValueError(f"step must be an integer >= 2, for the rate is compared with the last step's, got {step!r}")
    # Of sympy's symbols, with which the algebra is checked, it cannot be said.
    if isinstance(beta2, (Real, Tensor)) and not torch.as_tensor((beta2 >= 0) & (beta2 < 1)).all():
        raise ValueError(f"beta2 must be in [0, 1), got {beta2!r}")
    if not bias_correction:
        return 1
    power: Any = beta2 ** (step - 1)
    return 1 + step * power * (1 - beta2) / (1 - power)


def rate_does_not_increase(v: Number, mean: Number, beta2: Number, step: int, bias_correction: bool = True) -> Any:
    """Whether, at a constant learning rate, the effective rate of step t is at most that of step t-1 (equation 5).

    It is exactly where v_t >= φ_t v̄_{t-1}. Raises as :func:`mean_factor` does.

    Args:
        v: v_t, the second moment after step t.
        mean: v̄_{t-1}, the running mean before step t, of the shape of ``v``.
        beta2, step, bias_correction: as in :func:`mean_factor`.

    Returns:
        bool, or a bool tensor of the shape of ``v``.

    >>> rate_does_not_increase(1.0, 0.9, 0.9, 100), rate_does_not_increase(0.9, 1.0, 0.9, 100)
    (True, False)
    """
    return v >= mean_factor(beta2, step, bias_correction) * mean


def gradient_threshold(v: Number, mean: Number, beta2: Number, step: int, bias_correction: bool = True) -> Any:
    """The smallest g_t² at which the effective rate does not increase in step t: (φ_t v̄_{t-1} - β2 v_{t-1})/(1-β2).

    Equation 6. Negative where the rate does not increase whatever g_t is. Raises as :func:`mean_factor` does.

    Args:
        v: v_{t-1}, the second moment before step t.
        mean: v̄_{t-1}, the running mean before step t, of the shape of ``v``.
        beta2, step, bias_correction: as in :func:`mean_factor`.

    >>> gradient_threshold(1.0, 1.0, 0.5, 10, bias_correction=False)
    1.0
    """
    return (mean_factor(beta2, step, bias_correction) * mean - beta2 * v) / (1 - beta2)
