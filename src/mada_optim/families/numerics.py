"""Arithmetic that stays finite, and has a derivative, where plain arithmetic does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def root(x: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 at 0: elements that never saw a gradient must not yield NaN.

    Args:
        x: any shape, not negative.

    >>> torch.func.grad(root)(torch.tensor(0.0))
    tensor(0.)
    """
    nonzero = x != 0
    return torch.where(nonzero, torch.sqrt(torch.where(nonzero, x, 1.0)), 0.0)


def cut(grad: Tensor) -> Tensor:
    """Return gradients, cut where their square, or what is computed from it, would overflow: 7.2e16 in float32.

    What is not finite becomes NaN, so that it is seen.

    >>> cut(torch.tensor([1.0, -1e30, float("inf")]))
    tensor([ 1.0000e+00, -7.2058e+16,         nan])
    """
    largest = math.sqrt(torch.finfo(grad.dtype).max) / 256
    return grad.clamp(-largest, largest) + 0 * grad
