"""Ways to orthogonalize matrices, and where they bring singular values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.matrices import Layout, orthogonalize

# From tensors, each a matrix or a stack of matrices, to tensors of the same shapes.
Routine = Callable[[Sequence[Tensor]], list[Tensor]]
QUINTICS = "Muon's iteration, batched"
# Singular values below this share of the Frobenius norm are too small for Muon's iteration to bring them to 0.7.
_SMALL = 0.0016


def quintics(batch: Tensor) -> Tensor:
    """Torch.optim.Muon's iteration in the dtype of a batch of matrices, which the former OMADA took on the CPU."""
    tall = batch.size(1) > batch.size(2)
    x = batch.mT if tall else batch
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = (3.4445, -4.7750, 2.0315)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def batched_quintics(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Torch.optim.Muon's iteration in float32, on all matrices of one shape at once."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(index)
    results = list(tensors)
    for shape, members in by_shape.items():
        batch = torch.cat([tensors[index].reshape(-1, *shape[-2:]) for index in members])
        orthogonal = quintics(batch) * (0.2 * max(shape[-2:]) ** 0.5)
        for index, part in zip(members, orthogonal.chunk(len(members)), strict=True):
            results[index] = part.reshape(shape)
    return results


def orthogonalize_each(tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Orthogonalize as OMADA does."""
    return orthogonalize(tensors, Layout(stacked=tensors[0].dim() == 3), **options)


def muon_one_by_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize by torch.optim.Muon's own function, in bfloat16, scaled as by ``match_rms_adamw``."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    def orthogonalized(matrix: Tensor) -> Tensor:
        orthogonal: Tensor = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        return orthogonal.to(matrix.dtype).mul_(0.2 * max(matrix.shape) ** 0.5)

    return [_each(tensor, orthogonalized) for tensor in tensors]


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize by a singular value decomposition."""

    def orthogonalized(matrix: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        orthogonal: Tensor = u @ vh
        return orthogonal.mul_(0.2 * max(matrix.shape) ** 0.5)

    return [_each(tensor, orthogonalized) for tensor in tensors]


def _each(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(tensor) if tensor.dim() == 2 else torch.stack([function(matrix) for matrix in tensor])


def singular_values(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """The smallest and the largest singular value of results, without those that were too small before.

    They are taken along the singular vectors of what was orthogonalized, in float64.

    >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> low, high = singular_values([matrix], exact([matrix]))
    >>> round(low, 6), round(high, 6)
    (1.0, 1.0)
    """
    values = []
    for tensor, result in zip(tensors, results, strict=True):
        scale = 0.2 * max(tensor.shape[-2:]) ** 0.5
        u, s, vh = torch.linalg.svd(tensor.double(), full_matrices=False)
        along = torch.einsum("...ik,...ij,...kj->...k", u, result.double() / scale, vh)
        values.append(along[s >= _SMALL * torch.linalg.vector_norm(s, dim=-1, keepdim=True)])
    everything = torch.cat(values)
    return float(everything.min()), float(everything.max())
