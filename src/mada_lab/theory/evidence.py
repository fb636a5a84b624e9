"""Functions that satisfy the assumptions with known constants, and the mean squared gradient norm measured on them.

The update is the optimizers' own, :class:`mada_optim.MADAFamily`, with coefficients that are tensors: all settings and
all seeds advance in one tensor, (..., seeds, d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mada_lab.theory.bounds import Number, Problem, step_sizes
from mada_optim.families import MADAFamily


class Objective(Protocol):
    """A function F that satisfies the assumptions of ``docs/theory.md``, and its stochastic gradients."""

    @property
    def problem(self) -> Problem:
        """The constants d, L, R, F(x_1) - F*."""

    @property
    def start(self) -> Tensor:
        """x_1, shape (d,), float64."""

    def value(self, x: Tensor) -> Tensor:
        """F at ``x`` of shape (..., d); shape (...)."""

    def gradient(self, x: Tensor) -> Tensor:
        """∇F at ``x``, of its shape (..., d)."""

    def sample(self, seeds: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Draw the randomness of one step; returns x ↦ stochastic gradient, for x of shape (..., seeds, d)."""


@dataclass(frozen=True)
class TailedQuadratic:
    """F(x) = L Σ_i h(x_i) with h(x) = x²/2 up to |x| = c and linear beyond it, so that ∇F is bounded everywhere.

    The noise of every component is independent, +S with probability p and -S p/(1-p) otherwise, its mean 0. Rare large
    gradients of one sign are what Adam handles worst. c and S are such that gradients have exactly the bound of
    ``problem``: L c + S = R-ε. x_1 is such that F(x_1) - F* is ``problem.gap``; F* = 0.

    Args:
        problem: the constants, plain numbers.
        eps: ε.
        noise_share: S/(R-ε), in [0, 1). Default: 0.5.
        spike_probability: p in (0, 1/2]. Default: 0.1.

    Raises:
        ValueError: L is 0: there is no such quadratic.

    >>> quadratic = TailedQuadratic(Problem(3, 2.0, 1.0, 0.5), eps=1e-2)
    >>> round(quadratic.value(quadratic.start).item(), 12)
    0.5
    """

    problem: Problem
    eps: float
    noise_share: float = 0.5
    spike_probability: float = 0.1

    def __post_init__(self) -> None:
        if not self.problem.smoothness > 0:
            raise ValueError(f"smoothness must be > 0 for a quadratic, got {self.problem.smoothness!r}")

    @property
    def corner(self) -> float:
        """c, where the quadratic becomes linear."""
        return (1 - self.noise_share) * float(self.problem.gradient_bound - self.eps) / float(self.problem.smoothness)

    @property
    def start(self) -> Tensor:
        """See :class:`Objective`."""
        height = float(self.problem.gap / self.problem.dimension / self.problem.smoothness)
        corner = self.corner
        x = (2 * height) ** 0.5 if height <= corner**2 / 2 else height / corner + corner / 2
        return torch.full((int(self.problem.dimension),), x, dtype=torch.float64)

    def value(self, x: Tensor) -> Tensor:
        """See :class:`Objective`."""
        inside = x.abs().clamp(max=self.corner)
        return self.problem.smoothness * (inside**2 / 2 + self.corner * (x.abs() - inside)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return self.problem.smoothness * x.clamp(-self.corner, self.corner)

    def sample(self, seeds: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """See :class:`Objective`."""
        p, size = self.spike_probability, self.noise_share * float(self.problem.gradient_bound - self.eps)
        draw = torch.rand(seeds, int(self.problem.dimension), dtype=torch.float64, generator=generator)
        noise = size * ((draw < p).double() - p) / (1 - p)
        return lambda x: self.gradient(x) + noise


@dataclass(frozen=True)
class LogisticRegression:
    """F(x) = (1/n) Σ_i ln(1 + exp(-z_i·x)); a stochastic gradient is that of one i, drawn uniformly. x_1 = 0.

    R - ε is the largest |z_ij|, L the largest eigenvalue of Σ_i z_i z_iᵀ/(4n); F* is found by Newton's method.

    Args:
        samples: z_i = y_i · (features of sample i) with labels y_i = ±1, shape (n, d), float64, not separable: for no x
            all z_i·x are positive.
        eps: ε.

    >>> LogisticRegression(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), eps=0.5).problem
    Problem(dimension=1, smoothness=0.25, gradient_bound=1.5, gap=0.0)
    """

    samples: Tensor
    eps: float

    @property
    def problem(self) -> Problem:
        """See :class:`Objective`."""
        count, dimension = self.samples.shape
        smoothness = torch.linalg.eigvalsh(self.samples.T @ self.samples)[-1] / (4 * count)
        gap = self.value(self.start) - self.value(self.minimum())
        return Problem(dimension, smoothness.item(), self.samples.abs().max().item() + self.eps, gap.item())

    @property
    def start(self) -> Tensor:
        """See :class:`Objective`."""
        return torch.zeros(self.samples.shape[1], dtype=torch.float64)

    def minimum(self, iterations: int = 50) -> Tensor:
        """The minimizer, shape (d,)."""
        x = self.start
        for _ in range(iterations):
            share = torch.sigmoid(self.samples @ x)
            hessian = (self.samples.T * (share * (1 - share))) @ self.samples / len(self.samples)
            x = x - torch.linalg.solve(hessian, self.gradient(x))
        return x

    def value(self, x: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return torch.nn.functional.softplus(-(x @ self.samples.T)).mean(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return -torch.sigmoid(-(x @ self.samples.T)) @ self.samples / len(self.samples)

    def sample(self, seeds: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """See :class:`Objective`."""
        chosen = self.samples[torch.randint(len(self.samples), (seeds,), generator=generator)]
        return lambda x: -torch.sigmoid(-(x * chosen).sum(-1, keepdim=True)) * chosen


def random_logistic(dimension: int, eps: float, seed: int = 0) -> LogisticRegression:
    """Logistic regression on 10 d + 20 samples with features uniform in [-1, 1] and labels of which a fifth is wrong.

    Args:
        dimension: d.
        eps: ε.
        seed: of features and labels.

    >>> random_logistic(2, eps=0.1).samples.shape
    torch.Size([40, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    count = 10 * dimension + 20
    features = 2 * torch.rand(count, dimension, dtype=torch.float64, generator=generator) - 1
    truth = torch.randn(dimension, dtype=torch.float64, generator=generator)
    flips = torch.rand(count, dtype=torch.float64, generator=generator) < 0.2
    labels = torch.where(flips, -1.0, 1.0) * torch.sign(features @ truth)
    return LogisticRegression(labels[:, None] * features, eps)


def mean_squared_gradient(
    objective: Objective,
    *,
    beta1: Number = 0.0,
    beta2: Number,
    rho: Number,
    alpha: Number,
    eps: float,
    steps: int,
    decay: Number = 0.0,
    seeds: int,
    seed: int = 0,
) -> Tensor:
    """(1/T) Σ_t ‖∇F(x_t)‖² of T steps of the optimizer whose bound :mod:`~mada_lab.theory.bounds` gives.

    The update is MADA's with nothing learned and no weight decay; the learning rates are (1-β1^t) η_t, where the factor
    undoes the bias correction of m (1 where β1 = 0). All settings see the same noise.

    Args:
        objective: what is minimized.
        beta1, beta2, rho, alpha, decay: settings, numbers or tensors that are broadcast against each other.
        eps: ε.
        steps: T.
        seeds: number of independent runs.
        seed: of the first random number.

    Returns:
        Shape (..., seeds): the settings' common shape, then one value for each run.

    >>> quadratic = TailedQuadratic(Problem(1, 1.0, 1.0, 0.1), eps=1e-2)
    >>> rho = torch.tensor([0.0, 1.0])
    >>> mean_squared_gradient(quadratic, beta2=0.9, rho=rho, alpha=0.1, eps=1e-2, steps=10, seeds=3).shape
    torch.Size([2, 3])
    """
    lrs = step_sizes(alpha, steps, decay)
    beta1, beta2, rho = (torch.as_tensor(q, dtype=torch.float64)[..., None, None] for q in (beta1, beta2, rho))
    family, generator = MADAFamily(), torch.Generator().manual_seed(seed)
    points = {coefficient.name: coefficient.default for coefficient in family.coefficients}
    q = points | {"beta1": beta1, "beta2": beta2, "rho": rho, "eps": eps}
    # Broadcasting with the settings gives x and the buffers their full shape in the first step.
    x = objective.start.expand(seeds, -1)
    state = dict.fromkeys(family.buffers(q), torch.zeros_like(x))
    total = torch.zeros(seeds, dtype=torch.float64)
    for step in range(1, steps + 1):
        total = total + (objective.gradient(x) ** 2).sum(-1)
        grad = objective.sample(seeds, generator)(x)
        direction, state = family.update(state, grad, q, torch.tensor(float(step), dtype=torch.float64))
        x = x - (1 - beta1**step) * lrs[..., step - 1, None, None] * direction
    return (total / steps).expand(x.shape[:-1])
