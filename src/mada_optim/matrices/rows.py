"""Normalization of a direction's rows by their running second moment (NorMuon)."""

from __future__ import annotations

import torch
from torch import Tensor

from mada_optim.matrices.directions import FACTORS
from mada_optim.matrices.layout import Layout
from mada_optim.tensors.distributed import scatter_like, whole

ROW_EPS = 1e-8  # of NorMuon, beside the root of a row's mean square


def normalize_rows(
    direction: Tensor,
    squares: Tensor,
    beta: float,
    layout: Layout | None = None,
    adjust_lr_fn: str = "match_rms_adamw",
) -> tuple[Tensor, Tensor]:
    """Divide each row of an orthogonalized direction by the root of its running mean square; keep the matrix's norm.

    Rows count before the factor of :func:`orthogonalize`, so that the result is that factor times NorMuon's (Z. Li et
    al., "NorMuon: Making Muon more efficient and scalable", 2025, https://arxiv.org/abs/2510.05491).

    Args:
        direction: O_t, what :func:`orthogonalize` returned; a DTensor where the parameter is one.
        squares: r_{t-1}, shape :meth:`Layout.row_shape`, whole on each process.
        beta: β, by which r decays.
        layout: how matrices lie in the direction. None, the default: it is one matrix.
        adjust_lr_fn: the factor that :func:`orthogonalize` was told.

    Returns:
        N_t, placed as the direction, and r_t.

    >>> direction = 0.2 * 2**0.5 * torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    >>> normalize_rows(direction, torch.zeros(2, 1), 0.95)[0]
    tensor([[0.2236, 0.0000],
            [0.0000, 0.2236]])
    """
    layout = layout or Layout()
    rows = layout.rows()
    sums, before = _sums_of_squares(direction, layout), rows.cut(squares.to(direction.dtype))
    moments, factors = [], []
    for total, moment, (_, height, width) in zip(sums, before, layout.shapes(direction.shape), strict=True):
        moments.append(moment.lerp(total / (width * FACTORS[adjust_lr_fn](height, width) ** 2), 1 - beta))
        inverse = 1 / (moments[-1].sqrt() + ROW_EPS)
        # The squared norms of the matrix as it was and as it is with its rows divided.
        norm, divided = (x.sum(dim=1, keepdim=True) for x in (total, total * inverse**2))
        factors.append(inverse * (norm / divided.clamp(min=torch.finfo(divided.dtype).tiny)).sqrt())
    factor = scatter_like(_of_elements(factors, layout, direction.shape), direction)
    return direction * factor, rows.join(moments, squares.shape)


def _sums_of_squares(direction: Tensor, layout: Layout) -> list[Tensor]:
    """Return the sum of squares of each row: for each part a stack of shape (N, rows, 1), whole on each process."""
    if layout.dim == 1 and len(layout.parts) > 1:
        return [part.square().sum(dim=-1, keepdim=True) for part in layout.cut(whole(direction))]
    columns = tuple(range(1 + layout.stacked, direction.dim()))
    return layout.rows().cut(whole(direction.square().sum(dim=columns)).unsqueeze(-1))


def _of_elements(factors: list[Tensor], layout: Layout, shape: torch.Size) -> Tensor:
    """Factors of rows as factors of the elements of a tensor of this shape."""
    if layout.dim == 1 and len(layout.parts) > 1:
        widths = [width for _, _, width in layout.shapes(shape)]
        return layout.join([x.expand(-1, -1, width) for x, width in zip(factors, widths, strict=True)], shape)
    of_rows = layout.rows().join(factors, torch.Size(layout.row_shape(shape)))
    return of_rows.view(*of_rows.shape[:-1], *[1] * (len(shape) - of_rows.dim() + 1)).expand(shape)
