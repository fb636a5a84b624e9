"""Bounds on the mean squared gradient norm (1/T) Σ_t E‖∇F(x_t)‖²: the theorems of ``docs/theory.md``.

All arguments but ``steps`` may be tensors, which are broadcast against each other; results are float64. T steps are
taken with the learning rates η_t of :func:`step_sizes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor


@dataclass(frozen=True)
class Problem:
    """The constants of assumptions A1 to A3.

    Args:
        dimension: d, the number of parameters.
        smoothness: L, by which ‖∇F(x) - ∇F(y)‖ <= L ‖x - y‖.
        gradient_bound: R; every component of every stochastic gradient is at most R - ε in magnitude.
        gap: F(x_1) - F*, with F* any lower bound of F.

    Raises:
        ValueError: a constant is negative or not finite, ``dimension`` or ``gradient_bound`` is zero.

    >>> Problem(dimension=1, smoothness=1.0, gradient_bound=0.0, gap=1.0)
    Traceback (most recent call last):
    ValueError: gradient_bound must be a finite number > 0, got 0.0
    """

    dimension: Number
    smoothness: Number
    gradient_bound: Number
    gap: Number

    def __post_init__(self) -> None:
        for name in ("dimension", "gradient_bound"):
            _check(name, getattr(self, name), lambda x: (x > 0) & x.isfinite(), "a finite number > 0")
        for name in ("smoothness", "gap"):
            _check(name, getattr(self, name), lambda x: (x >= 0) & x.isfinite(), "a finite number >= 0")


def step_sizes(alpha: Number, steps: int, decay: Number = 0.0) -> Tensor:
    """Learning rates η_t = α T^(q-1/2) t^(-q), t = 1, ..., T (equation 2).

    Args:
        alpha: α > 0. The last rate is always α/√T.
        steps: T.
        decay: q in [0, 1/2]. 0, the default: constant, α/√T. 1/2: α/√t.

    Returns:
        Shape (..., T).

    >>> step_sizes(1.0, 4), step_sizes(1.0, 4, decay=0.5)
    (tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64), \
tensor([1.0000, 0.7071, 0.5774, 0.5000], dtype=torch.float64))
    """
    alpha = _check("alpha", alpha, lambda x: (x > 0) & x.isfinite(), "a finite number > 0")
    decay = _check("decay", decay, lambda x: (x >= 0) & (x <= 0.5), "in [0, 0.5]")
    times = _times(steps)
    return alpha[..., None] / math.sqrt(steps) * (steps / times) ** decay[..., None]


def newest_weight(rho: Number, beta2: Number, steps: int) -> Tensor:
    """w_t = (ρ + (1-ρ)/t) (1-β2)/(1-β2^t): the weight of g_t² in V_t (equation 3).

    Args:
        rho: ρ in [0, 1].
        beta2: β2 in (0, 1).
        steps: T.

    Returns:
        Shape (..., T).

    >>> newest_weight(0.0, 0.5, 3)
    tensor([1.0000, 0.3333, 0.1905], dtype=torch.float64)
    """
    rho, times = _rho(rho)[..., None], _times(steps)
    return (rho + (1 - rho) / times) / _window(beta2, times)


def log_terms(problem: Problem, *, rho: Number, beta2: Number, eps: Number, steps: int) -> Tensor:
    """λ_t of Lemma 2 (equation 8): Σ_t c_t w_t g_t²/(ε² + V_t) <= Σ_t c_t λ_t for every c_1 >= ... >= c_T >= 0.

    Args:
        problem: only R matters.
        rho, beta2, steps: as in :func:`newest_weight`.
        eps: ε in (0, R).

    Returns:
        Shape (..., T), non-negative. The sum over the last axis is Λ; for ρ = 0 that is ln((1 + (R-ε)²/ε²) u_T T).

    >>> round(log_terms(Problem(1, 1.0, 2.0, 1.0), rho=0.0, beta2=0.5, eps=1.0, steps=2).sum().exp().item(), 9)
    6.0
    """
    rho, beta2 = _rho(rho)[..., None], _beta2(beta2)
    bound, eps = _bound_and_eps(problem, eps)
    times = _times(steps)
    previous = (times - 1).clamp(min=1)
    # The first ratio is that of the old part of v̄, which is not there at ρ = 1.
    ratio = torch.maximum(
        torch.where(rho < 1, times / previous, 1.0), rho * times / (beta2[..., None] * (rho * times + 1 - rho))
    )
    later = torch.log(_window(beta2, times) / _window(beta2, previous)) + torch.log(ratio)
    return torch.where(times == 1, torch.log1p(((bound - eps) / eps) ** 2)[..., None], later)


def interpolation_bound(
    problem: Problem, *, rho: Number, beta2: Number, alpha: Number, eps: Number, steps: int, decay: Number = 0.0
) -> Tensor:
    """Theorem 3: the bound for V = (ρ v + (1-ρ) v̄)/(1-β2^t) without momentum; Adam's at ρ = 1, AVGrad's at ρ = 0.

    The smaller of the direct bound (equation 12) and of that by comparison with the critical ρ (equation 13).

    Args:
        problem: d, L, R, F(x_1) - F*.
        rho, beta2: as in :func:`newest_weight`.
        alpha, decay: as in :func:`step_sizes`.
        eps: ε in (0, R), added to √V.
        steps: T.

    Returns:
        Bound on (1/T) Σ_t E‖∇F(x_t)‖², of the arguments' common shape.

    Raises:
        ValueError: an argument is out of its range.

    >>> problem = Problem(dimension=1, smoothness=1.0, gradient_bound=1.0, gap=1.0)
    >>> rho = torch.tensor([0.0, 9e-4, 1.0])
    >>> interpolation_bound(problem, rho=rho, beta2=0.9, alpha=1.0, eps=1e-2, steps=10_000)
    tensor([3.3997, 0.6411, 0.7042], dtype=torch.float64)
    """
    reference = torch.minimum(_rho(rho), critical_rho(beta2, steps))
    setting: dict[str, Any] = {"rho": rho, "beta2": beta2, "alpha": alpha, "eps": eps, "steps": steps, "decay": decay}
    # Below the critical ρ the reference is ρ itself, and the two are the same.
    return torch.minimum(direct_bound(problem, **setting), _compared_bound(problem, reference=reference, **setting))


def direct_bound(
    problem: Problem, *, rho: Number, beta2: Number, alpha: Number, eps: Number, steps: int, decay: Number = 0.0
) -> Tensor:
    """Equation 12 alone, without the comparison that improves it for ρ in between; see :func:`interpolation_bound`.

    >>> problem = Problem(dimension=1, smoothness=1.0, gradient_bound=1.0, gap=1.0)
    >>> direct_bound(problem, rho=0.01, beta2=0.9, alpha=1.0, eps=1e-2, steps=10_000)
    tensor(5.4354, dtype=torch.float64)
    """
    return _compared_bound(
        problem, rho=rho, reference=_rho(rho), beta2=beta2, alpha=alpha, eps=eps, steps=steps, decay=decay
    )


def _compared_bound(
    problem: Problem,
    *,
    rho: Number,
    reference: Tensor,
    beta2: Number,
    alpha: Number,
    eps: Number,
    steps: int,
    decay: Number,
) -> Tensor:
    """Equation 13, with r = ``reference`` <= ρ; at r = ρ it is equation 12."""
    bound, smoothness = _tensor(problem.gradient_bound)[..., None], _tensor(problem.smoothness)[..., None]
    rho, rates = _rho(rho), step_sizes(alpha, steps, decay)
    weight, reference_weight = newest_weight(rho, beta2, steps), newest_weight(reference, beta2, steps)
    shrink = torch.where(rho == reference, 1.0, (1 - rho) / (1 - reference))[..., None]
    cost = (rates * bound * weight.sqrt() + rates**2 * smoothness / 2) / (shrink * reference_weight)
    largest_to_come = cost.flip(-1).cummax(-1).values.flip(-1)
    terms = log_terms(problem, rho=reference, beta2=beta2, eps=eps, steps=steps)
    return _mean_of(problem, (largest_to_come * terms).sum(-1), alpha, steps)


def avgrad_bound(
    problem: Problem,
    *,
    beta1: Number = 0.0,
    beta2: Number,
    alpha: Number,
    eps: Number,
    steps: int,
    decay: Number = 0.0,
) -> Tensor:
    """Theorems 1 (β1 = 0) and 2: the bound for AVGrad, ρ = 0, with momentum (equations 9 and 10).

    The optimizer whose bound it is has learning rates (1-β1^t) η_t, which undoes its bias correction of m.

    Args:
        problem, beta2, alpha, eps, steps, decay: as in :func:`interpolation_bound`.
        beta1: β1 in [0, 1).

    Returns:
        Bound on (1/T) Σ_t E‖∇F(x_t)‖², of the arguments' common shape.

    Raises:
        ValueError: an argument is out of its range.

    >>> problem = Problem(dimension=1, smoothness=1.0, gradient_bound=1.0, gap=1.0)
    >>> avgrad_bound(problem, beta1=torch.tensor([0.0, 0.5]), beta2=0.9, alpha=0.1, eps=1e-2, steps=10_000)
    tensor([1.7164, 3.5292], dtype=torch.float64)
    """
    beta1 = _check("beta1", beta1, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    memory = beta1 / (1 - beta1)
    bound, smoothness = _tensor(problem.gradient_bound), _tensor(problem.smoothness)
    alpha = _check("alpha", alpha, lambda x: (x > 0) & x.isfinite(), "a finite number > 0")
    window = _window(beta2, _times(steps)[-1:])[..., 0]
    noise, curvature = alpha * bound * window.sqrt(), alpha**2 * smoothness * window / 2
    logs = log_terms(problem, rho=0.0, beta2=beta2, eps=eps, steps=steps).sum(-1)
    cost = logs * (noise + (1 + 3 * memory) * curvature)
    cost = cost + memory * variation(problem, eps=eps, steps=steps, decay=decay) * (noise + (1 + memory) * curvature)
    return _mean_of(problem, cost, alpha, steps)


def variation(problem: Problem, *, eps: Number, steps: int, decay: Number = 0.0) -> Tensor:
    """Υ = ln(R/ε) + (1-q) ln T + 1/2 - q: bound on Σ_t |1 - A_t/A_{t-1}| for AVGrad's effective rates A (equation 11).

    Args:
        problem: only R matters.
        eps, steps, decay: as in :func:`interpolation_bound`.

    >>> variation(Problem(1, 1.0, 2.0, 1.0), eps=1.0, steps=1, decay=0.5)
    tensor(0.6931, dtype=torch.float64)
    """
    bound, eps = _bound_and_eps(problem, eps)
    decay = _check("decay", decay, lambda x: (x >= 0) & (x <= 0.5), "in [0, 0.5]")
    _times(steps)
    return torch.log(bound / eps) + (1 - decay) * math.log(steps) + 0.5 - decay


def critical_rho(beta2: Number, steps: int) -> Tensor:
    """ρ_c = min(1, β2/((1-β2)(T-1))), up to which Λ is as small as for AVGrad (Corollary 1, equation 14); 1 at T = 1.

    >>> critical_rho(0.9, 10_001)
    tensor(0.0009, dtype=torch.float64)
    """
    _times(steps)
    beta2 = _beta2(beta2)
    return torch.clamp(beta2 / ((1 - beta2) * (steps - 1)), max=1.0)


def best_rho(
    problem: Problem, *, beta2: float, alpha: float, eps: float, steps: int, decay: float = 0.0
) -> tuple[float, float]:
    """The ρ at which :func:`interpolation_bound` is smallest, and the bound there, by search on a grid.

    The grid has 0, 1, the critical ρ and 400 values spaced evenly in ln ρ from ρ_c/100 to 1. Arguments are single
    numbers, as in :func:`interpolation_bound`.

    >>> problem = Problem(dimension=1, smoothness=1.0, gradient_bound=1.0, gap=1.0)
    >>> rho, bound = best_rho(problem, beta2=0.9, alpha=1.0, eps=1e-2, steps=10_000)
    >>> 1 <= rho / critical_rho(0.9, 10_000).item() < 1.3
    True
    """
    critical = critical_rho(beta2, steps)
    spread = torch.logspace(math.log10(critical.item() / 100), 0, 400, dtype=torch.float64)
    grid = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), critical[None], spread])
    # A row of T numbers for each ρ, several of which must fit into memory together.
    rows = max(1, 2_000_000 // steps)
    bounds = torch.cat(
        [
            interpolation_bound(problem, rho=part, beta2=beta2, alpha=alpha, eps=eps, steps=steps, decay=decay)
            for part in (grid[start : start + rows] for start in range(0, len(grid), rows))
        ]
    )
    index = int(bounds.argmin())
    return float(grid[index]), float(bounds[index])


def _mean_of(problem: Problem, cost: Tensor, alpha: Number, steps: int) -> Tensor:
    """2R/(α√T) (F(x_1) - F* + d · cost): from the descent summed over all steps to the mean."""
    bound, dimension, gap = (_tensor(x) for x in (problem.gradient_bound, problem.dimension, problem.gap))
    return 2 * bound / (_tensor(alpha) * math.sqrt(steps)) * (gap + dimension * cost)


def _window(beta2: Number, times: Tensor) -> Tensor:
    """u_t = (1-β2^t)/(1-β2), the sum of the weights of an exponential average, (..., T)."""
    beta2 = _beta2(beta2)[..., None]
    # expm1 and log keep the digits where β2 is close to 1.
    return torch.expm1(times * beta2.log()) / (beta2 - 1)


def _times(steps: int) -> Tensor:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    return torch.arange(1, steps + 1, dtype=torch.float64)


def _rho(rho: Number) -> Tensor:
    return _check("rho", rho, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")


def _beta2(beta2: Number) -> Tensor:
    return _check("beta2", beta2, lambda x: (x > 0) & (x < 1), "in (0, 1)")


def _bound_and_eps(problem: Problem, eps: Number) -> tuple[Tensor, Tensor]:
    bound = _tensor(problem.gradient_bound)
    return bound, _check("eps", eps, lambda x: (x > 0) & (x < bound), "positive and below gradient_bound")


def _tensor(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _check(name: str, value: Number, allowed: Any, meaning: str) -> Tensor:
    tensor = _tensor(value)
    if not bool(allowed(tensor).all()):
        raise ValueError(f"{name} must be {meaning}, got {value!r}")
    return tensor
