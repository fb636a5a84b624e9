"""Glue for training frameworks. MADA needs none to train; what is here brings the coefficients into their logs.

This module imports no framework; :mod:`mada_optim.integrations.transformers` and
:mod:`mada_optim.integrations.lightning` import the one of their name.
"""

from __future__ import annotations

from torch.optim import Optimizer

from mada_optim.history.readings import learning_rates, unwrapped
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.scale.in_use import learned_scale

__all__ = ["scalars", "unwrap"]


def unwrap(optimizer: Optimizer) -> HypergradientOptimizer | None:
    """The optimizer that learns, out of the wrappers that accelerate, Lightning, SAM and others put around it.

    Args:
        optimizer: any optimizer. A wrapper is one that keeps what it wraps in its attribute ``optimizer`` or
            ``base_optimizer``.

    Returns:
        None where there is no :class:`mada_optim.HypergradientOptimizer` inside.
    """
    inner: object = optimizer
    while inner is not None and not isinstance(inner, HypergradientOptimizer):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "base_optimizer", None)
    return inner


def scalars(optimizer: Optimizer, prefix: str = "coefficients/") -> dict[str, float]:
    """Coefficients and learning rates by the names under which to log them.

    Reading them waits for the device, so do not at every step; :class:`mada_optim.History` does not wait.

    Args:
        optimizer: MADA or any :class:`mada_optim.HypergradientOptimizer`, or an optimizer with a
            :class:`mada_optim.LearnedScale`; also wrapped, see :func:`unwrap`.
        prefix: of the names. With ``hyper_per_group=True`` the index of the parameter group follows it.

    Returns:
        One number for each coefficient, and under ``skipped_hypergradients`` how many hypergradients were not finite.
        The learning rates in use, as ``lr`` or, where kinds of parameters or parameter groups have their own,
        ``lr_KIND``. With a learned scale the learning rates that were found, as ``learning_rate_KIND``.

    Raises:
        TypeError: the optimizer has neither coefficients nor a learned scale.

    >>> import torch
    >>> from mada_optim import MADA
    >>> scalars(MADA([torch.nn.Parameter(torch.zeros(2))], betas=(0.9, 0.95)))  # doctest: +ELLIPSIS
    {'coefficients/beta1': 0.9, 'coefficients/beta2': 0.95, ..., 'coefficients/skipped_hypergradients': 0}
    """
    inner = unwrap(optimizer)
    scale = learned_scale(inner or unwrapped(optimizer))
    values: dict[str, float] = {}
    if inner is None and scale is None:
        allowed = "a mada_optim.HypergradientOptimizer or have a LearnedScale"
        raise TypeError(f"optimizer must be {allowed}, got {type(optimizer).__name__}")
    if inner is not None:
        per_group = inner.defaults["hyper_per_group"]
        for index in range(len(inner.param_groups) if per_group else 1):
            start = f"{prefix}{index}/" if per_group else prefix
            values.update({f"{start}{name}": value for name, value in inner.coefficients(index).items()})
    rates = learning_rates(inner or unwrapped(optimizer))
    values.update({f"{prefix}{name}": float(rate) for name, rate in rates.items()})
    if scale is not None:
        values.update({f"{prefix}learning_rate_{kind}": value for kind, value in scale.values.items()})
    if inner is not None:
        values[f"{prefix}skipped_hypergradients"] = inner.skipped_hypergradients
    return values
