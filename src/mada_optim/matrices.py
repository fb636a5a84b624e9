"""Matrices: which parameters of a model they are, and the direction in which all singular values are one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Coefficients a, b, c of the quintic a x + b x³ + c x⁵, and how often it is applied (K. Jordan's Muon; torch.optim.Muon
# has the same): singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def matrix_parameters(model: nn.Module) -> list[Tensor]:
    """Real parameters of two and more dimensions, but for single rows and columns, embeddings and the output layer.

    The rule that optimizers with an orthogonalized direction share (K. Jordan, "Muon: An optimizer for hidden layers in
    neural networks", 2024): a hidden matrix or convolution maps activations to activations, and its whole spectrum
    counts; an embedding is a table of rows, and the output layer another. The output layer is the last module with such
    a weight; a weight that it shares with an embedding is an embedding. A table that is no ``nn.Embedding``, such as a
    parameter of positions with more than one row, cannot be told from a hidden matrix: give parameter groups then.

    Returns:
        Each parameter once, in the order of ``model.parameters()``.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 10))
    >>> [tuple(weight.shape) for weight in matrix_parameters(model)]
    [(8, 4)]
    """
    excluded: set[Tensor] = set()
    last: list[Tensor] = []
    for module in model.modules():
        own: list[Tensor] = [param for param in module.parameters(recurse=False) if param.dim() >= 2]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            excluded.update(own)
        elif own:
            last = own
    excluded.update(last)
    return [param for param in model.parameters() if may_be_matrix(param) and param not in excluded]


def may_be_matrix(param: Tensor) -> bool:
    """Whether a parameter has the shape and the type of a matrix; embeddings have, too."""
    if param.is_complex() or param.dim() < 2:
        return False
    rows = param.size(0)
    return min(rows, param.numel() // max(rows, 1)) > 1


def orthogonalize(tensors: Sequence[Tensor]) -> list[Tensor]:
    """U Vᵀ, nearly, for each of the matrices U S Vᵀ, times 0.2 √max(rows, columns).

    By the Newton-Schulz iteration of torch.optim.Muon, in bfloat16, on the CPU in float32. The factor (torch's
    ``match_rms_adamw``; Liu et al., "Muon is Scalable for LLM Training", 2025) gives the elements the root mean square
    of AdamW's step, 0.2, so that both share a learning rate. Matrices of the same shape are worked on together.

    Args:
        tensors: of two and more dimensions; the first counts as rows, all others together as columns.

    Returns:
        Tensors of the same shapes and dtypes.

    >>> direction, = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])])
    >>> bool(((direction / (0.2 * 2**0.5) - torch.eye(2)).abs() < 0.35).all())
    True
    """
    alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
    matrices = [tensor.flatten(1) for tensor in tensors]
    for index, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.device), []).append(index)
    found: list[Tensor] = list(tensors)
    for (shape, device), members in alike.items():
        dtype = working_dtype(device)
        results = _newton_schulz(torch.stack([matrices[index].to(dtype) for index in members]))
        scale = 0.2 * math.sqrt(max(shape))
        for index, result in zip(members, results.unbind(), strict=True):
            found[index] = (result.to(tensors[index].dtype) * scale).view(tensors[index].shape)
    return found


def working_dtype(device: torch.device) -> torch.dtype:
    """Of the Newton-Schulz iteration, which needs no more than bfloat16.

    Few CPUs have that in hardware; on others a product in it takes some 25 times as long as in float32.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _newton_schulz(batch: Tensor) -> Tensor:
    """Of a batch of matrices, shape (N, rows, columns)."""
    tall = batch.size(1) > batch.size(2)
    x = batch.mT if tall else batch
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
