"""The polynomials that move singular values towards one, and how to evaluate them with few products of matrices.

An odd polynomial x p(x²) acts on the singular values of X as p(X Xᵀ) X. The iteration applies one polynomial after
another. Each is the best approximation of 1 on the interval that the singular values have reached, which makes the
whole composition the best one (Amsel, Persson, Musco and Gower, "The Polar Express", 2025, arXiv 2505.16932).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

Row = tuple[float, float, float]


def nearest_to_one(degree: int, low: float, high: float) -> tuple[list[float], float]:
    """The odd polynomial x p(x²) that is nearest to one on an interval, by Remez' exchange of nodes.

    Args:
        degree: of p.
        low, high: ends of the interval, 0 < low < high.

    Returns:
        Coefficients of p, the constant first, and the largest distance from one.

    >>> p, distance = nearest_to_one(1, 0.5, 1.0)
    >>> round(distance, 4), all(abs(p[0] * x + p[1] * x**3 - 1) < distance + 1e-9 for x in (0.5, 0.7, 1.0))
    (0.086, True)
    """
    powers = 2 * torch.arange(degree + 1, dtype=torch.float64) + 1
    signs = (-1.0) ** torch.arange(degree + 2, dtype=torch.float64)
    angles = torch.linspace(0.0, torch.pi, degree + 2, dtype=torch.float64)
    nodes = (low + high) / 2 - (high - low) / 2 * torch.cos(angles)
    grid = low * (high / low) ** torch.linspace(0.0, 1.0, 40_001, dtype=torch.float64)
    while True:
        system = torch.cat([nodes[:, None] ** powers, signs[:, None]], dim=1)
        *coefficients, distance = torch.linalg.solve(system, torch.ones_like(nodes)).tolist()
        error = 1.0 - grid[:, None] ** powers @ torch.tensor(coefficients, dtype=torch.float64)
        # The largest error between two changes of its sign.
        ends = [0, *(torch.nonzero(error[1:].sign() != error[:-1].sign()).flatten() + 1).tolist(), len(grid)]
        worst = [start + int(error[start:end].abs().argmax()) for start, end in pairwise(ends)]
        if float(error.abs().max()) <= abs(distance) * (1 + 1e-9):
            return coefficients, abs(distance)
        nodes = grid[worst]


def composition(low: float, degrees: Sequence[int], top: float) -> list[list[float]]:
    """Polynomials that take singular values from [low, 1] to an interval whose upper end is ``top``.

    Args:
        low: the smallest singular value that is to arrive.
        degrees: of the p, one for each polynomial.
        top: upper end of where they arrive.
    """
    polynomials, high = [], 1.0
    for degree in degrees:
        coefficients, distance = nearest_to_one(degree, low, high)
        polynomials.append(coefficients)
        low, high = 1.0 - distance, 1.0 + distance
    polynomials[-1] = [top / high * coefficient for coefficient in polynomials[-1]]
    return polynomials


def rows(p: Sequence[float]) -> list[Row]:
    """How to evaluate p at a matrix Y, with one product a row.

    Each row (α, β, δ) but the last computes the next T = α Y T + β T + δ I, starting with T = Y. The last one is
    α T² + β S + δ I, where S is the T before. This is the square of a polynomial of half the degree, and a rest.

    Args:
        p: coefficients, the constant first. Their number is 3, 5 or 7, and the last is positive.
    """
    if len(p) == 3:
        return [(p[2], p[1], p[0])]
    root = p[-1] ** 0.5
    if len(p) == 5:
        half = p[3] / (2 * root)
        constant = (p[2] - half**2) / (2 * root)
        return [(root, half, constant), (1.0, p[1] - 2 * half * constant, p[0] - constant**2)]
    # T = r Y³ + s Y² + t Y + u, and a rest e Y² + f Y + g.
    s = p[5] / (2 * root)
    t = (p[4] - s**2) / (2 * root)
    u = (p[3] - 2 * s * t) / (2 * root)
    e, f, g = p[2] - 2 * s * u - t**2, p[1] - 2 * t * u, p[0] - u**2
    # With V = Y² + (f/e) Y + v: T = r Y V + w V + ..., and the rest is e V + ....
    ratio = f / e
    w = s - root * ratio
    v = (t - w * ratio) / root
    return [(1.0, ratio, v), (root, w, u - w * v), (1.0, e, g - e * v)]
