"""The orthogonal factor of matrices, by a Newton-Schulz iteration: products alone, which every device does fast."""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients a, b, c of the quintic a x + b x³ + c x⁵, and how often it is applied (K. Jordan's Muon; torch.optim.Muon
# has the same): singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def working_dtype(device: torch.device) -> torch.dtype:
    """Of the Newton-Schulz iteration, which needs no more than bfloat16.

    Few CPUs have that in hardware; on others a product in it takes some 25 times as long as in float32.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz(batch: Tensor) -> Tensor:
    """U Vᵀ, nearly, for each matrix U S Vᵀ of a batch.

    Args:
        batch: shape (N, rows, columns), in the dtype in which to work.

    Returns:
        The same shape and dtype. Matrices of zeros stay zero.
    """
    tall = batch.size(1) > batch.size(2)
    x = batch.mT if tall else batch
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
