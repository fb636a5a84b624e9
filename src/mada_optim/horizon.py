"""The hypergradient of a factor of all steps since the first, which sees further than the next one.

What is best for one step is always a small one: the gradient g_{t+1} points back along the direction in which the
iterates swing, and a smaller step swings less. Swings cost little, though, for they are gone when the learning rate has
fallen. So they are told apart from the way that has been gone. With x̄ the running mean of the iterates,

    x̄_{t+1} = 0.9 x̄_t + 0.1 x_{t+1},   x̃ = σ x_{t+1} + (1-σ) x̄_{t+1},   h = ⟨g_{t+1}, x̃ - x_1⟩:

is the loss still falling along the way, if swings count by a share σ? At σ = 1 that is the derivative of the loss by a
factor of all steps so far, decay included. At σ = 0 nothing would hold the factor back before it is too late.
``Kernels.follow`` computes both.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The parameter before its first step, in its dtype, and the running mean of its values, at least in float32.
INITIAL, MEAN = "initial_param", "mean_param"
BUFFERS = (INITIAL, MEAN)
DECAY = 0.9
SWING_SHARE = 0.5


def start(param: Tensor) -> dict[str, Tensor]:
    """The buffers of a parameter before its first step."""
    original = param.detach()
    copies = (original.to(dtype, copy=True, memory_format=torch.preserve_format) for dtype in dtypes(param))
    return dict(zip(BUFFERS, copies, strict=True))


def dtypes(param: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of :data:`BUFFERS`."""
    return param.dtype, torch.promote_types(param.dtype, torch.float32)
