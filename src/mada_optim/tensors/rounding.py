"""Rounding to bfloat16 that is right on average, so that many small changes are not all lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35  # factors of MurmurHash3's 32-bit finalizer


def mix(*numbers: int) -> int:
    """A seed that depends on all the numbers: MurmurHash3's 32-bit finalizer, one after the other.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    seed = 0
    for number in numbers:
        seed = _finalize((seed * _GOLDEN + number + 1) & _MASK)
    return seed


def noise_place(*place: int) -> int:
    """Return what a place contributes to the seeds of its noise: ``mix``, up to the last of its numbers, the step."""
    return (mix(*place) * _GOLDEN + 1) & _MASK


def noise_seed(place: int | Tensor, step: float | Tensor) -> int | Tensor:
    """Return the seed of the noise at a step and place: the same on every process, and again after a resume.

    Args:
        place: see :func:`noise_place`; an integer, or a 0-dimensional int64 tensor.
        step: a number, or a 0-dimensional tensor, for which the program does not wait.

    >>> seeds = [noise_seed(noise_place(1, 2), step) for step in (3, torch.tensor(3.0))]
    >>> seeds == [mix(1, 2, 3)] * 2
    True
    """
    count = step.to(torch.int64) if isinstance(step, Tensor) else int(step)
    seed: int | Tensor = _finalize((place + count) & _MASK)
    return seed


def _finalize(x: Any) -> Any:
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = ((x ^ (x >> 13)) * _SECOND) & _MASK
    return x ^ (x >> 16)


def _wrap(number: int | Tensor) -> int | Tensor:
    """Return the last 32 bits as a signed number, which is what torch computes with."""
    return number.to(torch.int32) if isinstance(number, Tensor) else ((number + (1 << 31)) & _MASK) - (1 << 31)


def round_stochastically(values: Tensor, seed: int | Tensor) -> Tensor:
    """Round float32 to bfloat16, to one of the two neighbours, so that the expectation is the value.

    Infinities and NaN stay what they are. The noise is a function of ``seed`` and of an element's position: the same
    on every process and after a resume.

    Args:
        values: float32 tensor.
        seed: which noise; an integer, or a 0-dimensional int64 tensor.

    Returns:
        bfloat16 tensor of the same shape.

    >>> third = torch.full((10_000,), 1 / 3)
    >>> sorted(set(round_stochastically(third, 0).tolist()))
    [0.33203125, 0.333984375]
    >>> bool((round_stochastically(third, 0).double().mean() - 1 / 3).abs() < 1e-4)
    True
    """
    index = torch.arange(values.numel(), device=values.device).to(torch.int32).view(values.shape)
    # _finalize in 32 bits, as GPUs have them: products wrap around, and masks take away the sign that is shifted in.
    x = _wrap(seed) + index * _wrap(_GOLDEN)
    x = (x ^ (x >> 16 & 0xFFFF)) * _wrap(_FIRST)
    x = (x ^ (x >> 13 & 0x7FFFF)) * _wrap(_SECOND)
    bits = values.view(torch.int32)
    # The noise decides whether the 16 bits that are cut off carry into those that are kept.
    rounded = ((bits + (x >> 16 & 0xFFFF)) & -0x10000).view(torch.float32)
    # An infinity has no bits that could carry.
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)
