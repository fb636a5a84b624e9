"""The learning rates that an optimizer uses, with or without a learned scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from mada_optim.scale.around import step_hooks
from mada_optim.scale.learned import LearnedScale

Rates = dict[str, float | Tensor]


def learned_scale(optimizer: Optimizer) -> LearnedScale | None:
    """Return the learned scale of an optimizer, which its hooks know."""
    owners = (getattr(hook, "__self__", None) for hook in step_hooks(optimizer))
    return next((owner for owner in owners if isinstance(owner, LearnedScale)), None)


def rates_in_use(optimizer: Optimizer) -> Rates:
    """Return the learning rates in use, by the kinds of parameters that the optimizer tells apart.

    Kinds are those of a learned scale or of OMADA ("matrices", "rest"), with the highest rate of their parameter
    groups. Without kinds, each parameter group has its rate under its index, or under "" where it is alone.
    """
    scale = learned_scale(optimizer)
    rates = [group.get("lr") for group in optimizer.param_groups] if scale is None else scale.rates(optimizer)
    by_kind: dict[str, list[float | Tensor]] = {}
    for kind, rate in zip(_kinds(optimizer, scale), rates, strict=True):
        if rate is not None:  # an Adafactor may have none
            by_kind.setdefault(kind, []).append(rate.detach() if isinstance(rate, Tensor) else float(rate))
    return {kind: _highest(several) for kind, several in by_kind.items()}


def _kinds(optimizer: Optimizer, scale: LearnedScale | None) -> list[str]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [""]
    if scale is not None and len(scale.values) > 1:
        return [str(scale.kind_of(group)) for group in groups]
    if len({group.get("matrices") for group in groups}) > 1:
        return ["matrices" if group.get("matrices") else "rest" for group in groups]
    return [str(index) for index in range(len(groups))]


def _highest(rates: Sequence[float | Tensor]) -> float | Tensor:
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(float(rate) for rate in rates)
    return torch.stack([torch.as_tensor(rate, device=tensors[0].device).reshape(()) for rate in rates]).max()
