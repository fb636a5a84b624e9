"""The direction in which all singular values of a matrix are one, for all matrices of a model at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mada_optim.matrices.layout import Layout
from mada_optim.matrices.newton_schulz import newton_schulz, within_range, working_dtype

# By what a direction is multiplied, from rows and columns; the names are those of torch.optim.Muon.
FACTORS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def orthogonalize(
    tensors: Sequence[Tensor],
    layout: Layout | None = None,
    *,
    ns_steps: int | None = None,
    ns_coefficients: Sequence[float] | None = None,
    adjust_lr_fn: str = "match_rms_adamw",
) -> list[Tensor]:
    """Return U Vᵀ, nearly, for each of the matrices U S Vᵀ, times a factor that depends on its shape.

    The iteration works in bfloat16, and in float32 on the CPU. The default factor, 0.2 √max(rows, columns), gives the
    elements the root mean square of AdamW's step, 0.2, so that both share a learning rate (Liu et al., "Muon is
    Scalable for LLM Training", 2025, arXiv 2502.16982). Matrices of the same shape are worked on together.

    Args:
        tensors: of two and more dimensions; the first counts as rows, all others together as columns.
        layout: how matrices lie in each of the tensors. None, the default: each is one matrix.
        ns_steps, ns_coefficients: None, the default: the polynomials of :func:`newton_schulz`. Otherwise the iteration
            of torch.optim.Muon, with so many steps (5) and these coefficients (3.4445, -4.7750, 2.0315).
        adjust_lr_fn: the factor, by torch.optim.Muon's name: "match_rms_adamw", the default, or "original",
            √max(1, rows / columns).

    Returns:
        Tensors of the same shapes and dtypes.

    >>> direction, = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])])
    >>> bool(((direction / (0.2 * 2**0.5) - torch.eye(2)).abs() < 0.35).all())
    True
    """
    layout = layout or Layout()
    cut = [layout.cut(tensor) for tensor in tensors]
    stacks = [stack for parts in cut for stack in parts]
    directions: list[Tensor] = list(stacks)
    for (shape, device), members in _by_shape(stacks).items():
        dtype = working_dtype(device)
        batch = torch.cat([_as(dtype, stacks[index]) for index in members])
        orthogonal = newton_schulz(batch, ns_steps, ns_coefficients).mul_(FACTORS[adjust_lr_fn](*shape))
        counts = [stacks[index].size(0) for index in members]
        for index, part in zip(members, torch.split(orthogonal, counts), strict=True):
            directions[index] = part.to(stacks[index].dtype)
    each = iter(directions)
    return [layout.join([next(each) for _ in parts], tensor.shape) for tensor, parts in zip(tensors, cut, strict=True)]


def check_options(ns_steps: int | None, ns_coefficients: Sequence[float] | None, adjust_lr_fn: str) -> None:
    """Raise ValueError where an option of :func:`orthogonalize` makes no sense."""
    if ns_steps is not None and not (type(ns_steps) is int and 1 <= ns_steps < 100):
        raise ValueError(f"ns_steps must be None or an integer from 1 to 99, got {ns_steps!r}")
    if ns_coefficients is not None:
        three = isinstance(ns_coefficients, (tuple, list)) and len(ns_coefficients) == 3
        if not three or not all(type(number) in (int, float) and math.isfinite(number) for number in ns_coefficients):
            raise ValueError(f"ns_coefficients must be None or three finite numbers, got {ns_coefficients!r}")
    if adjust_lr_fn not in list(FACTORS):
        raise ValueError(f"adjust_lr_fn must be one of {', '.join(FACTORS)}, got {adjust_lr_fn!r}")


def _as(dtype: torch.dtype, stack: Tensor) -> Tensor:
    """A stack in the dtype of the iteration, whose range is smaller than that of float64."""
    return (within_range(stack) if stack.dtype == torch.float64 else stack).to(dtype)


def _by_shape(stacks: Sequence[Tensor]) -> dict[tuple[torch.Size, torch.device], list[int]]:
    """Positions of the stacks whose matrices have the same shape and device."""
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, stack in enumerate(stacks):
        by_shape.setdefault((stack.shape[1:], stack.device), []).append(index)
    return by_shape
