"""Glue for training frameworks. MADA needs none to train; what is here brings the coefficients into their logs.

This module imports no framework; :mod:`mada_optim.integrations.transformers` and
:mod:`mada_optim.integrations.lightning` import the one of their name.
"""

from __future__ import annotations

from torch.optim import Optimizer

from mada_optim.optimizer import HypergradientOptimizer

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
    """Coefficients by the names under which to log them. Reading them waits for the device, so not at every step.

    Args:
        optimizer: MADA or any :class:`mada_optim.HypergradientOptimizer`, also wrapped, see :func:`unwrap`.
        prefix: of the names. With ``hyper_per_group=True`` the index of the parameter group follows it.

    Returns:
        One number for each coefficient, and under ``skipped_hypergradients`` how many hypergradients were not finite.
        With a learned scale the learning rates that were found, as ``learning_rate_KIND``.

    Raises:
        TypeError: the optimizer has no coefficients.

    >>> import torch
    >>> from mada_optim import MADA
    >>> scalars(MADA([torch.nn.Parameter(torch.zeros(2))], betas=(0.9, 0.95)))  # doctest: +ELLIPSIS
    {'coefficients/beta1': 0.9, 'coefficients/beta2': 0.95, ..., 'coefficients/skipped_hypergradients': 0}
    """
    found = unwrap(optimizer)
    if found is None:
        raise TypeError(f"optimizer must be a mada_optim.HypergradientOptimizer, got {type(optimizer).__name__}")
    values: dict[str, float] = {}
    if found.defaults["hyper_per_group"]:
        for index in range(len(found.param_groups)):
            values.update({f"{prefix}{index}/{name}": q for name, q in found.coefficients(index).items()})
    else:
        values.update({f"{prefix}{name}": q for name, q in found.coefficients().items()})
    if found.scale is not None:
        values.update({f"{prefix}learning_rate_{kind}": value for kind, value in found.scale.values.items()})
    values[f"{prefix}skipped_hypergradients"] = found.skipped_hypergradients
    return values
