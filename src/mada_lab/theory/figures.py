"""The figure of the bounds beside what is measured: ``mada bounds``. Needs the experiments' libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mada_lab.figures import save_figure
from mada_lab.theory.bounds import Problem, best_rho, critical_rho, direct_bound, interpolation_bound
from mada_lab.theory.evidence import TailedQuadratic, mean_squared_gradient
from mada_optim.history.drawing import PALETTE, style

_BOUND, _DIRECT = PALETTE[0], PALETTE[5]


@dataclass(frozen=True)
class Setting:
    """What ``mada bounds`` draws; β2 and T are those of the paper's Figure 1, the other values are ours.

    Args:
        beta2, alpha, eps, steps, decay: as in :func:`mada_lab.theory.interpolation_bound`.
        dimension, smoothness, gradient_bound, gap: as in :class:`mada_lab.theory.Problem`.
        seeds: runs on :class:`mada_lab.theory.evidence.TailedQuadratic` for each setting that is measured.

    Raises:
        ValueError: ``seeds`` is not positive, or no function can be measured. The rest is checked where it is used.
    """

    beta2: float = 0.9
    steps: int = 10_000
    alpha: float = 0.3
    eps: float = 1e-2
    decay: float = 0.0
    dimension: int = 10
    smoothness: float = 1.0
    gradient_bound: float = 1.0
    gap: float = 1.0
    seeds: int = 4

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be an integer >= 1, got {self.seeds!r}")
        TailedQuadratic(self.problem, self.eps)

    @property
    def problem(self) -> Problem:
        """The constants of the function that is measured."""
        return Problem(self.dimension, self.smoothness, self.gradient_bound, self.gap)

    def bound(self, rho: Tensor, steps: int) -> Tensor:
        """Theorem 3 at each ρ, shape of ``rho``."""
        return interpolation_bound(
            self.problem, rho=rho, beta2=self.beta2, alpha=self.alpha, eps=self.eps, steps=steps, decay=self.decay
        )

    def direct(self, rho: Tensor, steps: int) -> Tensor:
        """The direct bound at each ρ, shape of ``rho``."""
        return direct_bound(
            self.problem, rho=rho, beta2=self.beta2, alpha=self.alpha, eps=self.eps, steps=steps, decay=self.decay
        )

    def best(self) -> tuple[float, float]:
        """The ρ with the smallest bound, and that bound."""
        return best_rho(
            self.problem, beta2=self.beta2, alpha=self.alpha, eps=self.eps, steps=self.steps, decay=self.decay
        )

    def measured(self, rho: Tensor, steps: int) -> Tensor:
        """Mean squared gradient norms, (..., seeds)."""
        return mean_squared_gradient(
            TailedQuadratic(self.problem, self.eps),
            beta2=self.beta2,
            rho=rho,
            alpha=self.alpha,
            eps=self.eps,
            steps=steps,
            decay=self.decay,
            seeds=self.seeds,
        )


def bounds(setting: Setting) -> list[tuple[str, float, float]]:
    """Return name, ρ and bound at ρ = 0, at the critical ρ, at ρ = 1 and at the best ρ."""
    critical = critical_rho(setting.beta2, setting.steps).item()
    rows = [("AVGrad", 0.0), ("ρ_c", critical), ("Adam", 1.0)]
    values = setting.bound(torch.tensor([rho for _, rho in rows], dtype=torch.float64), setting.steps).tolist()
    return [*((name, rho, value) for (name, rho), value in zip(rows, values, strict=True)), ("best", *setting.best())]


def summarize(setting: Setting) -> str:
    """The bounds at ρ = 0, the critical and the best ρ, and ρ = 1, one line each.

    >>> print(summarize(Setting()))
    AVGrad  ρ = 0        bound 19.37
    ρ_c     ρ = 0.0009   bound 4.828
    Adam    ρ = 1        bound 6.834
    best    ρ = 0.0009   bound 4.828
    """
    return "\n".join(f"{name:<8}ρ = {rho:<9.3g}bound {bound:.4g}" for name, rho, bound in bounds(setting))


def draw_bounds(setting: Setting, path: Path) -> None:
    """Draw ``path``.png and .svg: bound and measurement over ρ at T steps (left), over T at three ρ (right)."""
    with style():
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1.25, 1)})
        _draw_over_rho(left, setting)
        _draw_over_steps(right, setting)
        figure.suptitle(
            f"β2 = {setting.beta2:g}, α = {setting.alpha:g}, ε = {setting.eps:g}, d = {setting.dimension}, "
            f"L = {setting.smoothness:g}, R = {setting.gradient_bound:g}, F(x₁) - F* = {setting.gap:g}; "
            f"dots: quadratic with rare large gradients, {setting.seeds} seeds",
            x=0.01,
            ha="left",
            color="#555555",
            fontsize=10,
        )
        save_figure(figure, path)


def _draw_over_rho(axes: Axes, setting: Setting) -> None:
    critical = critical_rho(setting.beta2, setting.steps)
    lowest = critical.log10().floor().item() - 2
    rho = torch.cat([torch.logspace(lowest, 0, 300, dtype=torch.float64), critical[None]]).sort().values
    axes.plot(
        rho, setting.direct(rho, setting.steps), color=_DIRECT, ls="--", lw=1.2, label="direct bound, equation 12"
    )
    axes.plot(rho, setting.bound(rho, setting.steps), color=_BOUND, label="bound, Theorem 3")
    _draw_trivial(axes, setting)
    marks = torch.logspace(lowest, 0, 9, dtype=torch.float64)
    _draw_measured(axes, marks, setting.measured(marks, setting.steps), _BOUND, "measured")
    best, smallest = setting.best()
    axes.plot([best], [smallest], "v", color=_BOUND, ms=8)
    axes.annotate(f"best ρ = {best:.2g}", (best, smallest), xytext=(8, -12), textcoords="offset points", color=_BOUND)
    axes.set(xscale="log", yscale="log", title=f"After T = {setting.steps:,} steps", xlabel="ρ  (0: AVGrad, 1: Adam)")
    axes.set_ylabel("mean squared gradient norm")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.35), fontsize=9)


def _draw_over_steps(axes: Axes, setting: Setting) -> None:
    def rhos(steps: int) -> Tensor:
        return torch.tensor([0.0, critical_rho(setting.beta2, steps).item(), 1.0], dtype=torch.float64)

    drawn_at = [round(10 ** (exponent / 4)) for exponent in range(8, 25)]
    measured_at = [steps for steps in (100, 1_000, 10_000) if steps <= setting.steps]
    bounds = torch.stack([setting.bound(rhos(steps), steps) for steps in drawn_at])
    values = torch.stack([setting.measured(rhos(steps), steps) for steps in measured_at]) if measured_at else None
    for index, (label, colour) in enumerate(
        (("AVGrad, ρ = 0", PALETTE[2]), ("critical ρ of each T", PALETTE[0]), ("Adam, ρ = 1", PALETTE[1]))
    ):
        axes.plot(drawn_at, bounds[:, index], color=colour, label=label)
        if values is not None:
            # The dots nearly coincide: each is smaller than the one below it.
            _draw_measured(axes, torch.tensor(measured_at), values[:, index], colour, size=8 - 2 * index)
    _draw_trivial(axes, setting)
    axes.set(xscale="log", title="Bounds (lines) and measurements (dots)", xlabel="steps T")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.42), fontsize=9)


def _draw_trivial(axes: Axes, setting: Setting) -> None:
    height = setting.dimension * (setting.gradient_bound - setting.eps) ** 2
    axes.axhline(height, color="#999999", ls=":", lw=1.2, label="d (R - ε)², true at any point")


def _draw_measured(axes: Axes, x: Tensor, values: Tensor, colour: str, label: str | None = None, size: int = 4) -> None:
    low, mean, high = values.amin(-1), values.mean(-1), values.amax(-1)
    axes.errorbar(x, mean, (mean - low, high - mean), fmt="o", ms=size, color=colour, lw=1, label=label)
