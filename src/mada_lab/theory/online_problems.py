"""The online problem of Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018).

Adam goes to the wrong end of it for suitable betas, AMSGrad and AVGrad to the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from mada_lab.errors import require
from mada_optim.optimizers.base import HypergradientOptimizer

LOW, HIGH = -1.0, 1.0


@dataclass(frozen=True)
class OnlineProblem:
    """Losses f_t(x) = c_t x on [-1, 1]: c_t is ``rare`` once in a period, at first, and -``common`` at the other times.

    ``rare`` outweighs the others of its period, so that -1 is the best x: what is seldom seen decides.

    Args:
        rare: a positive number.
        common: a positive number.
        period: its length.
        stochastic: c_t is ``rare`` with probability 1/``period``, independently, instead of once in each period.

    >>> OnlineProblem(3.0, 1.0, 3).slopes(7).tolist()
    [3.0, -1.0, -1.0, 3.0, -1.0, -1.0, 3.0]
    """

    rare: float
    common: float
    period: int
    stochastic: bool = False

    def slopes(self, steps: int, seed: int = 0) -> Tensor:
        """c_1, ..., c_T, shape (``steps``,), float64; ``seed`` is that of the stochastic form."""
        if self.stochastic:
            generator = torch.Generator().manual_seed(seed)
            rare = torch.rand(steps, dtype=torch.float64, generator=generator) < 1 / self.period
        else:
            rare = torch.arange(steps) % self.period == 0
        return torch.where(rare, self.rare, -self.common).double()


PROBLEMS = {
    "theorem": OnlineProblem(3.0, 1.0, 3),  # Theorem 1, at C = 3
    "periodic": OnlineProblem(1010.0, 10.0, 101),  # section 5, synthetic experiments
    "stochastic": OnlineProblem(1010.0, 10.0, 100, stochastic=True),
}


@dataclass(frozen=True)
class Trace:
    """What happened at each of T steps; all of shape (T,), float64.

    Args:
        iterates: x_t, at which f_t is paid, before the step that sees c_t.
        average_regret: see :func:`average_regret`.
        rho: ρ in use at step t; NaN for an optimizer without it.
        hypergradient: the latest of ρ that is known at step t, before clipping; NaN where there is none.
    """

    iterates: Tensor
    average_regret: Tensor
    rho: Tensor
    hypergradient: Tensor


def average_regret(slopes: Tensor, iterates: Tensor) -> Tensor:
    """R_t/t for all t, with the regret R_t = Σ_{s<=t} f_s(x_s) - min_x Σ_{s<=t} f_s(x) over x in [-1, 1].

    Args:
        slopes: c_1, ..., c_T, shape (T,).
        iterates: x_1, ..., x_T, shape (T,).

    Returns:
        Shape (T,).

    >>> average_regret(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([0.0, -1.0, -1.0])).tolist()
    [3.0, 1.5, 1.0]
    """
    # The best x in hindsight is at an end, and costs -|Σ c_s|.
    regret = (slopes * iterates).cumsum(0) + slopes.cumsum(0).abs()
    return regret / torch.arange(1, len(slopes) + 1)


@torch.no_grad()
def play(
    slopes: Tensor,
    make: Callable[[list[nn.Parameter]], Optimizer],
    alpha: float,
    projected: bool = False,
    on_step: Callable[[], None] | None = None,
) -> Trace:
    """Play the losses f_t(x) = c_t x from x_1 = 0, with learning rates α/√t and projection onto [-1, 1].

    Args:
        slopes: c_1, ..., c_T, shape (T,).
        make: the optimizer for a list of parameters.
        alpha: α.
        projected: whether hypergradients are of what is paid, at the projected iterate: 0 after a step that the
            projection cut. False: as everywhere, of the loss where the step led, f_{t+1}(x_t - η_t Δ_t).
        on_step: called after each step.

    Raises:
        InputError: ``alpha`` is not a positive, finite number.

    >>> trace = play(PROBLEMS["theorem"].slopes(300), lambda x: torch.optim.Adam(x, betas=(0.0, 0.1)), alpha=0.5)
    >>> trace.iterates[-3:].mean().item() > 0.9
    True
    """
    require(0 < alpha < math.inf, "alpha", alpha, "a finite number > 0")
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    x.grad = grad = torch.zeros_like(x)
    optimizer = make([x])
    group = optimizer.param_groups[0]
    iterates, rhos = [], []
    cut = False
    for step, slope in enumerate(slopes.tolist(), start=1):
        iterates.append(x.item())
        grad.fill_(slope)
        group["lr"] = alpha / step**0.5
        if projected and cut and isinstance(optimizer, HypergradientOptimizer):
            optimizer.hyper_grad_scale = 0.0
        optimizer.step()
        cut = not LOW <= x.item() <= HIGH
        x.clamp_(LOW, HIGH)
        rhos.append(_rho(optimizer))
        if on_step is not None:
            on_step()
    rho, hypergradient = torch.tensor(rhos, dtype=torch.float64).reshape(-1, 2).T
    path = torch.tensor(iterates, dtype=torch.float64)
    return Trace(path, average_regret(slopes, path), rho, hypergradient)


def _rho(optimizer: Optimizer) -> tuple[float, float]:
    """ρ and its latest hypergradient."""
    if not isinstance(optimizer, HypergradientOptimizer):
        return float("nan"), float("nan")
    latest = optimizer.hypergradients() or {}
    return optimizer.coefficients().get("rho", float("nan")), latest.get("rho", float("nan"))
