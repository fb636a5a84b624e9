"""What an optimizer says about itself at one moment, without waiting for its device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mada_optim.history.notation import RATE
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.scale.in_use import Rates, rates_in_use


def unwrapped(optimizer: Any) -> Optimizer:
    """Return torch's optimizer out of the wrappers that accelerate, Lightning, SAM and others put around it.

    Args:
        optimizer: an optimizer. A wrapper is one that keeps what it wraps in its attribute ``optimizer`` or
            ``base_optimizer``.

    Raises:
        TypeError: there is no optimizer with torch's hooks inside.
    """
    inner = optimizer
    while inner is not None and not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "base_optimizer", None)
    if inner is None:
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def learning_rates(optimizer: Optimizer) -> Rates:
    """Return the learning rates in use by name: ``lr_KIND``, or ``lr`` where there is one. See :func:`rates_in_use`."""
    return {f"{RATE}_{kind}" if kind else RATE: rate for kind, rate in rates_in_use(optimizer).items()}


def coefficients(optimizer: Optimizer) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return names and values of each set of coefficients. The values go on changing with the optimizer.

    With ``hyper_per_group=True`` the index of the parameter group stands before a name: ``0/rho``.
    """
    if not isinstance(optimizer, HypergradientOptimizer):
        return []
    names = tuple(coefficient.name for coefficient in optimizer.family.coefficients)
    if not optimizer.defaults["hyper_per_group"]:
        return [(names, optimizer.param_groups[0]["coefficients"])]
    return [
        (tuple(f"{index}/{name}" for name in names), group["coefficients"])
        for index, group in enumerate(optimizer.param_groups)
    ]
