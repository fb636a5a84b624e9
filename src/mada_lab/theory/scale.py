"""The learned scale on a noisy quadratic: where its rule comes to rest, and which learning rate is best. Exact.

The model has f(x) = ½ Σ h_i x_i² and gradients g_t = h x_t + ξ_t, with noise of mean 0 that is independent from step to
step. It is the model of Wu et al., "Understanding Short-Horizon Bias in Stochastic Meta-Optimization" (ICLR 2018,
https://arxiv.org/abs/1803.02021), and of Zhang et al., "Which Algorithmic Choices Matter at Which Batch Sizes?"
(NeurIPS 2019, https://arxiv.org/abs/1907.04164). Training is SGD with the learning rate κ η_t::

    W_t = Σ_{i≤t} η_i g_i                      the way gone
    x_{t+1} = x_1 - κ W_t
    W̄_t = w W̄_{t-1} + (1-w) W_t

κ is the same in all steps. Then first and second moments of x, W and W̄ follow from linear recursions, coordinate by
coordinate. For a κ that moves, this is the limit in which it moves slowly. ``docs/scale-theory.md`` draws conclusions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mada_optim.scale import LearnedScale, SearchSettings


@dataclass(frozen=True)
class NoisyQuadratic:
    """f(x) = ½ Σ h_i x_i² with noisy gradients. Coordinates of one curvature may be added up: distances and noises.

    Args:
        curvature: h_i > 0, shape (n,).
        distance: E x_{1,i}², shape (n,).
        noise: variance of the noise of g_i, shape (n,).
    """

    curvature: Tensor
    distance: Tensor
    noise: Tensor

    @property
    def highest_rate(self) -> float:
        """2/max h: at this learning rate gradient descent diverges."""
        return 2.0 / float(self.curvature.max())


def harmonic_quadratic(condition: float = 1e4, noise: float = 1.0, count: int = 60) -> NoisyQuadratic:
    """The spectrum h_i = 1/i of Zhang et al., drawn together to ``count`` curvatures from 1 to 1/condition.

    E x_{1,i}² is the same for all i, and the variance of the noise is proportional to h_i. So each octave of curvature
    has the same share of the loss and of the noise.

    Args:
        condition: largest over smallest curvature.
        noise: variance of the noise of all gradients together. Twice the batch size is half of it.
        count: number of curvatures, in equal steps of their logarithm.

    Returns:
        The problem, with f(x_1) = 1 in expectation.

    >>> problem = harmonic_quadratic(condition=100.0, count=3)
    >>> problem.curvature.tolist()
    [1.0, 0.1, 0.01]
    """
    curvature = torch.logspace(0.0, -math.log10(condition), count, dtype=torch.float64)
    each = torch.full_like(curvature, 1.0 / count)
    return NoisyQuadratic(curvature, 2.0 * each / curvature, noise * each)


class Moments(NamedTuple):
    """Expectations after a number of steps, shape (..., n) for learning rates of shape (...).

    Args:
        start: E[x_1 x].
        square: E[x²].
        mean_way: E[x κ W̄].
    """

    start: Tensor
    square: Tensor
    mean_way: Tensor


def moments(problem: NoisyQuadratic, rate: Tensor, shares: Tensor, window: float = 0.97) -> Moments:
    """Moments of x_{t+1} after the t steps whose learning rates are κ times ``shares``.

    Args:
        problem: what is minimized.
        rate: κ, shape (...).
        shares: η_1, ..., η_t, shape (t,).
        window: w.

    >>> problem = NoisyQuadratic(*torch.tensor([[2.0], [9.0], [0.0]], dtype=torch.float64))
    >>> moments(problem, torch.tensor(0.25), torch.ones(1)).square.item()  # x halves
    2.25
    """
    rate = rate.to(torch.float64)[..., None]
    start = problem.distance.expand(*rate.shape[:-1], -1)
    square, mean_way = start, torch.zeros_like(start)
    for share in shares.tolist():
        step = rate * share
        kept = 1.0 - step * problem.curvature
        start = kept * start
        square = kept**2 * square + step**2 * problem.noise
        mean_way = window * kept * mean_way + (1 - window) * (start - square)
    return Moments(start, square, mean_way)


def expected_loss(problem: NoisyQuadratic, rate: Tensor, shares: Tensor) -> Tensor:
    """E f(x_{t+1}) after the steps of ``shares``, shape of ``rate``."""
    return 0.5 * (problem.curvature * moments(problem, rate, shares).square).sum(-1)


def whole_way_signal(
    problem: NoisyQuadratic, rate: Tensor, shares: Tensor, swing: float = 0.5, window: float = 0.97
) -> Tensor:
    """What the learned scale sees: E h_t = -κ E⟨g_{t+1}, σ W_t + (1-σ) W̄_t⟩. Negative where it makes κ larger.

    Args:
        problem: what is minimized.
        rate: κ, shape (...).
        shares: η_1, ..., η_t, shape (t,).
        swing: σ.
        window: w.

    Returns:
        Shape of ``rate``.
    """
    after = moments(problem, rate, shares, window)
    way = swing * (after.start - after.square) + (1 - swing) * after.mean_way
    return -(problem.curvature * way).sum(-1)


def horizon_signal(problem: NoisyQuadratic, rate: Tensor, shares: Tensor, horizon: int | None = None) -> Tensor:
    """What a rule sees that differentiates through the last steps: ∂E f(x_{t+1}) by the log of their learning rate.

    Args:
        problem: what is minimized.
        rate: κ, shape (...).
        shares: η_1, ..., η_t, shape (t,).
        horizon: how many of the last steps the factor multiplies; 1 for ordinary hypergradient descent. None: all.

    Returns:
        Shape of ``rate``.
    """
    before = 0 if horizon is None else max(0, len(shares) - horizon)
    square = moments(problem, rate, shares[:before]).square
    rate = rate.to(torch.float64)[..., None]
    slope = torch.zeros_like(square)
    for share in shares[before:].tolist():
        step = rate * share
        kept = 1.0 - step * problem.curvature
        slope = kept**2 * slope - 2 * kept * step * problem.curvature * square + 2 * step**2 * problem.noise
        square = kept**2 * square + step**2 * problem.noise
    return 0.5 * (problem.curvature * slope).sum(-1)


def resting_rate(problem: NoisyQuadratic, signal: Callable[[Tensor], Tensor], lowest: float = 1e-6) -> float:
    """The smallest κ at which a signal turns from negative to positive: where a rule that follows it comes to rest.

    Args:
        problem: what is minimized; κ is sought below its :attr:`~NoisyQuadratic.highest_rate`.
        signal: of learning rates, shape (n,) to (n,).
        lowest: at which the search begins.

    Raises:
        ValueError: the signal is not negative at ``lowest``.

    >>> problem = NoisyQuadratic(*torch.tensor([[2.0], [9.0], [0.0]], dtype=torch.float64))
    >>> round(resting_rate(problem, lambda rate: whole_way_signal(problem, rate, torch.ones(1))), 3)
    0.5
    """
    low, high = math.log(lowest), math.log(problem.highest_rate)
    for _ in range(3):
        logs = torch.linspace(low, high, 65, dtype=torch.float64)
        positive = (signal(logs.exp()) >= 0).nonzero()
        if len(positive) > 0 and positive[0].item() == 0:
            raise ValueError(f"lowest must be a rate at which the signal asks for a larger one, got {lowest}")
        first = int(positive[0]) if len(positive) > 0 else len(logs) - 1
        low, high = float(logs[first - 1]), float(logs[first])
    return math.exp((low + high) / 2)


def best_rate(problem: NoisyQuadratic, shares: Tensor) -> float:
    """The κ with the smallest expected loss after the steps of ``shares``.

    >>> problem = NoisyQuadratic(*torch.tensor([[2.0], [9.0], [0.0]], dtype=torch.float64))
    >>> round(best_rate(problem, torch.ones(1)), 3)
    0.5
    """
    return resting_rate(problem, lambda rate: horizon_signal(problem, rate, shares))


def cosine_shares(steps: int) -> Tensor:
    """η_t of half a cosine from 1 to near 0, shape (steps,).

    >>> [round(share, 3) for share in cosine_shares(3).tolist()]
    [1.0, 0.75, 0.25]
    """
    return 0.5 * (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps))


def searched_rates(
    problem: NoisyQuadratic, shares: Tensor, settings: SearchSettings, seeds: int, momentum: float = 0.0
) -> Tensor:
    """κ of :class:`mada_optim.LearnedScale` with SGD after the steps of ``shares``, before a margin. A simulation.

    Args:
        problem: what is minimized. x_{1,i} is plus or minus the root of its ``distance``, the noise is normal.
        shares: η_1, ..., η_t, shape (t,).
        settings: of the search; the number of its steps is t.
        seeds: number of independent searches.
        momentum: of SGD.

    Returns:
        Shape (seeds,).
    """
    rates = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, problem.distance.shape, generator=generator) * 2 - 1
        x = torch.nn.Parameter(signs * problem.distance.sqrt())
        optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum)
        scale = LearnedScale(optimizer, settings=replace(settings, steps=len(shares) + 1, least_share=0.0))
        for share in shares.tolist():
            noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            x.grad = problem.curvature * x.detach() + problem.noise.sqrt() * noise
            optimizer.param_groups[0]["lr"] = share
            optimizer.step()
        rates.append(scale.value)
    return torch.tensor(rates, dtype=torch.float64)
