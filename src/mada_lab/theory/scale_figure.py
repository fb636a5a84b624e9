"""The figure of the learned scale on a noisy quadratic: ``mada scale``. Needs the experiments' libraries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mada_lab.figures import save_figure
from mada_lab.theory.scale import (
    best_rate,
    cosine_shares,
    expected_loss,
    harmonic_quadratic,
    horizon_signal,
    resting_rate,
    searched_rates,
    whole_way_signal,
)
from mada_optim.history.drawing import PALETTE, style
from mada_optim.scale import SearchSettings

SEARCH = SearchSettings()
BEST = "best for the whole run"
RULE = "whole way, σ = 1/2"
LAST = "last step"
LENGTHS = tuple(round(10 ** (exponent / 4)) for exponent in range(10, 17))
"""Steps of the runs whose best rate is drawn."""


@dataclass(frozen=True)
class Setting:
    """What ``mada scale`` draws.

    Args:
        condition: largest over smallest curvature.
        noise: variance of a gradient's noise.
        steps: of the run, with a cosine from its first to its last step.
        seeds: searches by :class:`mada_optim.LearnedScale` for each dot.

    Raises:
        ValueError: an argument is out of its range.
    """

    condition: float = 1e4
    noise: float = 1.0
    steps: int = 2000
    seeds: int = 8

    def __post_init__(self) -> None:
        for name, lowest in (("condition", 1.0), ("noise", 1e-3), ("steps", 2 * SEARCH.steps), ("seeds", 1)):
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} must be at least {lowest:g}, got {getattr(self, name)!r}")


def resting_rates(setting: Setting) -> dict[str, float]:
    """Return, by name of the signal, the κ at which a rule rests that follows it, at the end of the search."""
    problem = harmonic_quadratic(setting.condition, setting.noise)
    shares = cosine_shares(setting.steps)
    until = shares[: SEARCH.steps]
    signals = {
        LAST: partial(horizon_signal, problem, shares=until, horizon=1),
        "last 10 steps": partial(horizon_signal, problem, shares=until, horizon=10),
        "last 100 steps": partial(horizon_signal, problem, shares=until, horizon=100),
        "all steps so far": partial(horizon_signal, problem, shares=until),
        "whole way, σ = 1": partial(whole_way_signal, problem, shares=until, swing=1.0),
        RULE: partial(whole_way_signal, problem, shares=until),
    }
    return {BEST: best_rate(problem, shares)} | {name: resting_rate(problem, s) for name, s in signals.items()}


def rates_and_losses(setting: Setting) -> list[tuple[str, float, float]]:
    """Return the name of each rule, its resting rate, and the expected loss at the end of the run at this rate."""
    problem, shares = harmonic_quadratic(setting.condition, setting.noise), cosine_shares(setting.steps)
    rates = resting_rates(setting)
    rates[f"{RULE}, times {SEARCH.margin:g}"] = SEARCH.margin * rates[RULE]
    losses = expected_loss(problem, torch.tensor(list(rates.values()), dtype=torch.float64), shares).tolist()
    return [(name, rate, loss) for (name, rate), loss in zip(rates.items(), losses, strict=True)]


def summarize(setting: Setting) -> str:
    """Each rule's resting rate, and the expected loss at the end of the run at this rate."""
    rows = rates_and_losses(setting)
    return "\n".join(f"{name:<30}rate {rate:<9.3g}loss {loss:.3f}" for name, rate, loss in rows)


def draw_scale(setting: Setting, path: Path) -> None:
    """Draw ``path``.png and .svg: resting rates over noise (left), the best rate over the length of the run (right)."""
    with style():
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_over_noise(left, setting)
        _draw_over_steps(right, setting)
        save_figure(figure, path)


def _draw_over_noise(axes: Axes, setting: Setting) -> None:
    noises = [10 ** (exponent / 2) for exponent in range(-2, 5)]
    settings = [Setting(setting.condition, noise, setting.steps, setting.seeds) for noise in noises]
    rates = [resting_rates(each) for each in settings]
    looks = {BEST: (PALETTE[6], "-"), RULE: (PALETTE[0], "-"), LAST: (PALETTE[1], "-")}
    looks |= {"all steps so far": (PALETTE[2], "--"), "last 10 steps": (PALETTE[1], "--")}
    for name, (colour, dashes) in looks.items():
        axes.plot(noises, [each[name] for each in rates], color=colour, ls=dashes, label=name)
    until = cosine_shares(setting.steps)[: SEARCH.steps]
    for start, marker in ((SEARCH.start, "v"), (1e-2, "o")):
        for noise in noises:
            problem = harmonic_quadratic(setting.condition, noise)
            searched = searched_rates(problem, until, SearchSettings(start=start), setting.seeds)
            label = f"searched from {start:g}" if noise == noises[0] else None
            axes.plot([noise], [searched.median()], marker, color=PALETTE[0], ms=5, mfc="white", label=label)
    axes.set(xscale="log", yscale="log", xlabel="variance of a gradient's noise", ylabel="learning rate")
    axes.set_title(f"After {SEARCH.steps} of {setting.steps:,} steps")
    axes.legend(frameon=False, fontsize=9)


def _draw_over_steps(axes: Axes, setting: Setting) -> None:
    for condition, colour in ((1e2, PALETTE[3]), (1e3, PALETTE[4]), (1e4, PALETTE[5])):
        problem = harmonic_quadratic(condition, setting.noise)
        best = [best_rate(problem, cosine_shares(steps)) for steps in LENGTHS]
        axes.plot(LENGTHS, best, color=colour, label=f"best, condition {condition:,.0f}")
        held = SEARCH.margin * resting_rates(Setting(condition, setting.noise, setting.steps))[RULE]
        axes.axhline(held, color=colour, ls=":", label=f"{SEARCH.margin:g} times the rule's")
    axes.set(
        xscale="log", xlabel="steps of the run", title=f"Noise {setting.noise:g}: the search does not know the length"
    )
    axes.legend(frameon=False, fontsize=9)
