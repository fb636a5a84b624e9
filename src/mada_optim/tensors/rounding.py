"""Rounding to bfloat16 that is right on average, so that many small changes are not all lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 over the golden ratio; below 0, as Triton multiplies indices in 32 bits


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
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


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
    index = torch.arange(values.numel(), device=values.device, dtype=torch.int64).view(values.shape)
    x = (seed + index * _GOLDEN) & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    bits = values.view(torch.int32)
    # The noise decides whether the 16 bits that are cut off carry into those that are kept.
    rounded = ((bits + (x >> 16).to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)
