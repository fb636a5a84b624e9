"""The orthogonal factor of matrices, by polynomials: products of matrices alone, which every device does fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mada_optim.matrices.polynomials import Row
from mada_optim.matrices.products import multiply

# Torch's coefficients a, b, c of the quintic a x + b x³ + c x⁵, and how often it is applied (K. Jordan's Muon).
TORCH_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TORCH_STEPS = 5

# Singular values from LOW to 1 arrive between 0.73 and TOP. Before, they are divided by (Σ σ⁴)^¼ of their matrix.
# The polynomials are those that polynomials.py computes.
LOW, TOP, DEGREES = 0.0014, 1.15, (6, 4, 4)
POLYNOMIALS: tuple[tuple[Row, ...], ...] = (
    (
        (1.0, -1.7690707004501542, 0.9598830836220167),
        (65.06042441544655, 8.312304560856859, -12.608337652585664),
        (1.0, 0.09179097021342386, 0.014429714375975775),
    ),
    ((0.7131391327318071, -3.1917063077473267, 2.5523285026449787), (1.0, -0.03746736604424683, 0.23829796867952968)),
    ((0.5994202655630446, -2.313922640185347, 1.7401143744817598), (1.0, -0.16321935297797374, 0.8987944779932637)),
)

# Singular values beyond 1 leave the interval of the polynomials: rounding of the norm must not bring them there.
_SAFETY = 1.001
# A matrix of a smaller norm is not enlarged to norm one, as by torch.optim.Muon: a gradient that vanishes fades out.
_SMALLEST = 1e-7
# Sums of squares of larger elements may overflow.
_LARGEST = 1e15
# Where one side is so many times longer than the other, the iteration on the Gram matrix has less to compute.
_LONG = 1.6
# Elements of the Gram matrices that are worked on at a time, so that they stay in the cache.
_TOGETHER = 2**19


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the iteration, which needs no more than bfloat16.

    Few CPUs have that in hardware; on others a product in it takes some 25 times as long as in float32.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz(batch: Tensor, steps: int | None = None, coefficients: Sequence[float] | None = None) -> Tensor:
    """Return U Vᵀ, nearly, for each matrix U S Vᵀ of a batch.

    In float32, with neither ``steps`` nor ``coefficients``, singular values of at least 0.0014 (Σ σ⁴)^¼ end between
    0.73 and 1.15. That is at most 0.0014 n^¼ times the largest, with n the shorter side. In bfloat16, or with one of
    the two, the iteration is that of torch.optim.Muon.

    Args:
        batch: shape (N, rows, columns), in the dtype in which to work.
        steps: how often the quintic a x + b x³ + c x⁵ is applied. Default: 5, where it is applied.
        coefficients: a, b, c. Default: those of torch.optim.Muon.

    Returns:
        The same shape and dtype. Matrices of zeros stay zero, matrices with an element that is not finite become NaN.
    """
    if steps is not None or coefficients is not None or batch.dtype.itemsize < 4:
        a, b, c = coefficients or TORCH_COEFFICIENTS
        batch = within_range(batch)
        norm = torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True)
        quintics = [((c, b, a),)] * (TORCH_STEPS if steps is None else steps)
        return _by_matrix(batch / norm.clamp(min=_SMALLEST), None, quintics)
    if not batch.numel():
        return batch.clone()
    short, long = sorted(batch.shape[1:])
    iterate = _by_gram if long > _LONG * short else _by_matrix
    together = max(1, _TOGETHER // short**2)
    return torch.cat([iterate(*_bounded(some), POLYNOMIALS) for some in torch.split(batch, together)])


def within_range(batch: Tensor) -> Tensor:
    """Matrices whose largest element is beyond 1e15, divided by it: squares of the others do not overflow.

    >>> within_range(torch.tensor([[[2.0]], [[4e20]]])).flatten().tolist()
    [2.0, 1.0]
    """
    if not batch.numel():
        return batch
    largest = _largest(batch)
    return batch / torch.where(largest > _LARGEST, largest, 1.0)


def _largest(batch: Tensor) -> Tensor:
    """The largest absolute value of each matrix, shape (N, 1, 1)."""
    dim = (1, 2)
    return torch.maximum(batch.amax(dim, keepdim=True), -batch.amin(dim, keepdim=True))


def _bounded(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices whose singular values are at most one, and their Gram matrices.

    They are divided by the fourth root of the sum of the fourth powers of their singular values. This is never above
    the Frobenius norm, and for a random matrix of 256 rows it is three times closer to the largest singular value.
    """
    x = batch / _largest(batch).clamp(min=_SMALLEST)  # whose squares cannot overflow
    gram = _gram(x)
    # By rows first: a sum of so many numbers at once is less exact.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(gram, dim=2, keepdim=True), dim=1, keepdim=True)
    norm = (norm * _SAFETY).clamp(min=1.0)
    return x / norm.sqrt(), gram / norm


def _by_matrix(x: Tensor, gram: Tensor | None, polynomials: Sequence[Sequence[Row]]) -> Tensor:
    """X, p X, p p X, ..., where each p is a polynomial of the Gram matrix X Xᵀ of what X has become."""
    for *rows, (alpha, beta, constant) in polynomials:
        p = _polynomial(_gram(x) if gram is None else gram, [*rows, (alpha, beta, 0.0)])
        x, gram = _apply(p, x, constant), None
    return x


def _by_gram(x: Tensor, gram: Tensor, polynomials: Sequence[Sequence[Row]]) -> Tensor:
    """The same without the X between: where X becomes p X, its Gram matrix Y becomes p Y p.

    Rounding in Y grows by p². After that p and Y do not commute: the factors have to stay in the order of p p X.
    """
    factor = None
    for index, rows in enumerate(polynomials):
        p = _polynomial(gram, rows)
        factor = p if factor is None else multiply(p, factor)
        if index + 1 < len(polynomials):
            gram = multiply(multiply(p, gram), p, symmetric=True)
    return x if factor is None else _apply(factor, x)


def _polynomial(y: Tensor, rows: Sequence[Row]) -> Tensor:
    """A polynomial of symmetric matrices; see :func:`mada_optim.matrices.polynomials.rows`."""
    previous = value = y
    for alpha, beta, constant in rows[:-1]:
        following = multiply(y, value, alpha=alpha, added=value, beta=beta, diagonal=constant, symmetric=True)
        previous, value = value, following
    alpha, beta, constant = rows[-1]
    return multiply(value, value, alpha=alpha, added=previous, beta=beta, diagonal=constant, symmetric=True)


def _gram(x: Tensor) -> Tensor:
    """The Gram matrix of the shorter side."""
    return multiply(x.mT, x, symmetric=True) if _is_tall(x) else multiply(x, x.mT, symmetric=True)


def _apply(p: Tensor, x: Tensor, constant: float = 0.0) -> Tensor:
    """(P + δ I) X, or X (Pᵀ + δ I) where X is tall."""
    a, b = (x, p.mT) if _is_tall(x) else (p, x)
    return multiply(a, b, added=x if constant else None, beta=constant)


def _is_tall(x: Tensor) -> bool:
    return x.size(1) > x.size(2)
