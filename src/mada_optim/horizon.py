"""The hypergradient of a factor of all steps since the first, which sees further than the next one.

What is best for one step is always a small one: the gradient g_{t+1} points back along the direction in which the
iterates swing, and a smaller step swings less. Swings cost little, though, for they are gone when the learning rate has
fallen. So they are told apart from the way that has been gone. With x̄ the running mean of the iterates,

    x̄_{t+1} = 0.9 x̄_t + 0.1 x_{t+1},   x̃ = σ x_{t+1} + (1-σ) x̄_{t+1},   h = ⟨g_{t+1}, x̃ - x_1⟩:

is the loss still falling along the way, if swings count by a share σ? At σ = 1 that is the derivative of the loss by a
factor of all steps so far, decay included. At σ = 0 nothing would hold the factor back before it is too late.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mada_optim.kernels.base import Batch
from mada_optim.kernels.blocks import make_blocks

# The parameter before its first step, in its dtype, and the running mean of its values, at least in float32.
INITIAL, MEAN = "initial_param", "mean_param"
BUFFERS = (INITIAL, MEAN)
DECAY = 0.9
SWING_SHARE = 0.5
_PIECE = 1 << 15


def start(param: Tensor) -> dict[str, Tensor]:
    """The buffers of a parameter before its first step."""
    precise = torch.promote_types(param.dtype, torch.float32)
    copies = (
        param.detach().to(dtype, copy=True, memory_format=torch.preserve_format) for dtype in (param.dtype, precise)
    )
    return dict(zip(BUFFERS, copies, strict=True))


def follow(batch: Batch, wanted: bool) -> Tensor | None:
    """Bring the running means up to date, before a step.

    Args:
        batch: parameters that have a gradient and :data:`BUFFERS`.
        wanted: whether to compute h.

    Returns:
        h, if it is wanted: float64, 0-dimensional. Of parameters that are spread over processes, this one's part.
    """
    total = torch.zeros((), dtype=torch.float64, device=batch.device) if wanted else None
    for block in make_blocks(batch.roles, elementwise=True, gather=batch.group["foreach"] is not False, cut=False):
        (param, _), (first, _), (mean, stored) = (block.flat(role) for role in ("param", *BUFFERS))
        # On a CPU in pieces that stay in its cache.
        size = min(_PIECE, len(param)) if batch.device.type == "cpu" else len(param)
        way = torch.empty(size, dtype=batch.dtype, device=batch.device)
        for start in range(0, len(param), size):
            piece = slice(start, start + size)
            now, average = param[piece].to(batch.dtype), mean[piece]
            average.lerp_(now, 1 - DECAY)
            if total is not None:
                grad = block.flat("grad")[0][piece].to(batch.dtype)
                # Differences first: the weights are large beside the way that they have come.
                came = torch.lerp(average, now, SWING_SHARE, out=way[: len(now)]).sub_(first[piece])
                total += torch.dot(grad, came)
        if not stored:
            block.write_flat(MEAN, mean)
    return -total if total is not None and batch.group["maximize"] else total
