"""The hypergradient of a factor of all steps since the first, which sees further than the next one.

What is best for one step is always a small one: the gradient g_{t+1} points back along the direction in which the
iterates swing, and a smaller step swings less. Swings cost little, though, for they are gone when the learning rate has
fallen. So they are told apart from the way that has been gone. With x̄ the running mean of the iterates,

    x̄_{t+1} = 0.9 x̄_t + 0.1 x_{t+1},   x̃ = σ x_{t+1} + (1-σ) x̄_{t+1},   h = ⟨g_{t+1}, x̃ - x_1⟩:

is the loss still falling along the way, if swings count by a share σ? At σ = 1 that is the derivative of the loss by a
factor of all steps so far. At σ = 0 nothing would hold the factor back before it is too late.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mada_optim.sharding import Team, local

# The parameter before its first step, in its dtype, and the running mean of its values, at least in float32.
INITIAL, MEAN = "initial_param", "mean_param"
BUFFERS = (INITIAL, MEAN)
DECAY = 0.9
SWING_SHARE = 0.5


def start(param: Tensor) -> dict[str, Tensor]:
    """The buffers of a parameter before its first step."""
    precise = torch.promote_types(param.dtype, torch.float32)
    copies = (
        param.detach().to(dtype, copy=True, memory_format=torch.preserve_format) for dtype in (param.dtype, precise)
    )
    return dict(zip(BUFFERS, copies, strict=True))


def follow(states: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
    """Bring the running means of the iterates up to date, before each step."""
    for param, state in states:
        mean = local(state[MEAN])
        mean.lerp_(local(param.detach()).to(mean.dtype), 1 - DECAY)


def along_the_way(
    group: dict[str, Any], states: Iterable[tuple[Tensor, dict[str, Any]]], team: Team | None
) -> Tensor | float:
    """h over parameters of a group that have a gradient.

    Args:
        group: parameter group.
        states: parameters, and what is kept for each.
        team: the processes over which parameters are spread; the sum is then this one's part.
    """
    total: Tensor | float = 0.0
    for param, state in states:
        tensors = (param.grad, param, state[INITIAL], state[MEAN])
        grad, now, first, mean = (local(tensor.detach()).flatten() for tensor in tensors if tensor is not None)
        grad = grad.to(torch.promote_types(param.dtype, torch.float32))
        share = (1.0 if team is None else team.share(param)) * (-1.0 if group["maximize"] else 1.0)
        # Products in place of differences: nothing of the parameter's size is allocated.
        now, first, mean = (torch.vdot(grad, x.to(grad.dtype)) for x in (now, first, mean))
        total = total + share * (SWING_SHARE * now + (1 - SWING_SHARE) * mean - first).real.double()
    return total
