"""The hypergradient of a factor of all steps since the first, which sees further than the next one.

What is best for one step is always a small one: the gradient g_{t+1} points back along the direction in which the
iterates swing, and a smaller step swings less. So a factor of the step is learned from

    h = ⟨g_{t+1}, x_{t+1} - x_1⟩,

the derivative of the loss by a factor of all steps so far: is it still falling in the direction in which the parameters
have come?
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mada_optim.sharding import Team, local

# The parameter before its first step, in its own dtype.
INITIAL = "initial_param"


def start(param: Tensor) -> dict[str, Tensor]:
    """What is kept of a parameter, before its first step."""
    return {INITIAL: param.detach().clone(memory_format=torch.preserve_format)}


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
        tensors = (param.grad, param, state[INITIAL])
        grad, now, first = (local(tensor.detach()).flatten() for tensor in tensors if tensor is not None)
        grad = grad.to(torch.promote_types(param.dtype, torch.float32))
        share = (1.0 if team is None else team.share(param)) * (-1.0 if group["maximize"] else 1.0)
        # Products in place of a difference: nothing of the parameter's size is allocated.
        along = torch.vdot(grad, now.to(grad.dtype)) - torch.vdot(grad, first.to(grad.dtype))
        total = total + share * along.real.double()
    return total
