"""The direction in which all singular values of a matrix are one, for all matrices of a model at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mada_optim.matrices.layout import Layout
from mada_optim.matrices.newton_schulz import newton_schulz, working_dtype


def orthogonalize(tensors: Sequence[Tensor], layout: Layout | None = None) -> list[Tensor]:
    """U Vᵀ, nearly, for each of the matrices U S Vᵀ, times 0.2 √max(rows, columns).

    By the Newton-Schulz iteration of torch.optim.Muon, in bfloat16, on the CPU in float32. The factor (torch's
    ``match_rms_adamw``; Liu et al., "Muon is Scalable for LLM Training", 2025) gives the elements the root mean square
    of AdamW's step, 0.2, so that both share a learning rate. Matrices of the same shape are worked on together.

    Args:
        tensors: of two and more dimensions; the first counts as rows, all others together as columns.
        layout: how matrices lie in each of the tensors. None, the default: each is one matrix.

    Returns:
        Tensors of the same shapes and dtypes.

    >>> direction, = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])])
    >>> bool(((direction / (0.2 * 2**0.5) - torch.eye(2)).abs() < 0.35).all())
    True
    """
    layout = layout or Layout()
    cut = [layout.cut(tensor) for tensor in tensors]
    directions = iter(_directions([stack for stacks in cut for stack in stacks]))
    return [
        layout.join([next(directions) for _ in stacks], tensor.shape)
        for tensor, stacks in zip(tensors, cut, strict=True)
    ]


def direction_scale(rows: int, columns: int) -> float:
    """By what :func:`orthogonalize` multiplies the orthogonal matrix."""
    return 0.2 * math.sqrt(max(rows, columns))


def _directions(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Of stacks of matrices, shape (N, rows, columns) each, in their own dtypes."""
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, stack in enumerate(stacks):
        by_shape.setdefault((stack.shape[1:], stack.device), []).append(index)
    directions: list[Tensor] = list(stacks)
    for (shape, device), members in by_shape.items():
        dtype = working_dtype(device)
        orthogonal = newton_schulz(torch.cat([stacks[index].to(dtype) for index in members]))
        scale = direction_scale(*shape)
        counts = [stacks[index].size(0) for index in members]
        for index, part in zip(members, torch.split(orthogonal, counts), strict=True):
            directions[index] = part.to(stacks[index].dtype) * scale
    return directions
