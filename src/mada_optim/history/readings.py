"""What an optimizer says about itself at one moment, without waiting for its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mada_optim.history.notation import RATE
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.scale import LearnedScale
from mada_optim.scale.around import step_hooks

Rates = dict[str, float | Tensor]


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


def learned_scale(optimizer: Optimizer) -> LearnedScale | None:
    """Return the learned scale of an optimizer, which its hooks know."""
    owners = (getattr(hook, "__self__", None) for hook in step_hooks(optimizer))
    return next((owner for owner in owners if isinstance(owner, LearnedScale)), None)


def learning_rates(optimizer: Optimizer) -> Rates:
    """Return the learning rates in use, by the kinds of parameters that the optimizer tells apart.

    Kinds are those of a learned scale or of OMADA (``lr_matrices``, ``lr_rest``), with the highest rate of their
    parameter groups. Without kinds, each parameter group has its rate (``lr_0``, ``lr_1``; ``lr`` where it is alone).
    """
    scale = learned_scale(optimizer)
    rates = [group.get("lr") for group in optimizer.param_groups] if scale is None else scale.rates(optimizer)
    by_kind: dict[str, list[float | Tensor]] = {}
    for kind, rate in zip(_kinds(optimizer, scale), rates, strict=True):
        if rate is not None:  # an Adafactor may have none
            by_kind.setdefault(kind, []).append(rate.detach() if isinstance(rate, Tensor) else float(rate))
    return {f"{RATE}_{kind}" if kind else RATE: _highest(several) for kind, several in by_kind.items()}


def _kinds(optimizer: Optimizer, scale: LearnedScale | None) -> list[str]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [""]
    if scale is not None and len(scale.values) > 1:
        return [str(scale._key(group)) for group in groups]
    if len({group.get("matrices") for group in groups}) > 1:
        return ["matrices" if group.get("matrices") else "rest" for group in groups]
    return [str(index) for index in range(len(groups))]


def _highest(rates: Sequence[float | Tensor]) -> float | Tensor:
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(float(rate) for rate in rates)
    return torch.stack([torch.as_tensor(rate, device=tensors[0].device).reshape(()) for rate in rates]).max()


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
