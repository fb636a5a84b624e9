"""``mada online``: Adam, AMSGrad, AVGrad and MADA on the problem of :mod:`mada_lab.theory.online_problems`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from torch import nn
from torch.optim.optimizer import Optimizer

from mada_lab.errors import require
from mada_lab.figures import save_figure
from mada_lab.files import finite
from mada_lab.stats import mean_interval
from mada_lab.theory.online_problems import HIGH, LOW, PROBLEMS, Trace, play
from mada_optim.history.drawing import PALETTE, EndLabel, label_ends, label_in_full, style
from mada_optim.optimizers.avgrad import AVGrad
from mada_optim.optimizers.mada import MADA
from mada_optim.optimizers.presets import load_optimizer

Make = Callable[[list[nn.Parameter]], Optimizer]
OnStep = Callable[[], None] | None
Traces = Sequence[Trace]  # one for each seed

ADAM, AMSGRAD, AVGRAD, FROM_ADAM, FROM_AVGRAD = "Adam", "AMSGrad", "AVGrad", "MADA from Adam", "MADA from ρ = 0"
_COLOURS = dict(
    zip(
        (ADAM, AMSGRAD, AVGRAD, FROM_ADAM, FROM_AVGRAD),
        (PALETTE[1], PALETTE[3], PALETTE[2], PALETTE[0], PALETTE[5]),
        strict=True,
    )
)
# What ``mada online --scan`` goes through; the theorem is about no momentum, and a β2 that forgets within a period.
_SCAN_BETAS = {
    "theorem": [(0.0, beta2) for beta2 in (0.1, 0.3, 0.5)],
    "periodic": [(beta1, beta2) for beta1 in (0.0, 0.9, 0.95) for beta2 in (0.99, 0.999)],
}
_SCAN_HYPER_LR = (0.01, 0.1, 1.0, 10.0)
_SCAN_HELD = (1.0, 0.3, 0.1, 0.03, 0.0)  # ρ
_POINTS = 100  # of a line in the figure, at most
_DIGITS = {"iterates": 2, "average_regret": 3, "rho": 2}  # of what the table and the figure print


@dataclass(frozen=True)
class Setting:
    """What ``mada online`` plays.

    Args:
        problem: a name in :data:`mada_lab.theory.online_problems.PROBLEMS`.
        betas: of all optimizers, never learned. None: (0, 0.1) for the theorem, (0.95, 0.99) for the others.
        alpha: α; the learning rate is α/√t.
        steps: T. Default: a hundred periods of the periodic problem.
        hyper_lr: step size of ρ.
        seeds: runs of the stochastic problem; the others are played once.
        projected: see :func:`mada_lab.theory.online_problems.play`.

    Raises:
        ValueError: a value is not allowed.
    """

    problem: str = "periodic"
    betas: tuple[float, float] | None = None
    alpha: float = 2.0
    steps: int = 10_100
    hyper_lr: float = 0.1
    seeds: int = 4
    projected: bool = False

    def __post_init__(self) -> None:
        require(self.problem in PROBLEMS, "problem", self.problem, f"one of {', '.join(PROBLEMS)}")
        require(self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(self.seeds >= 1, "seeds", self.seeds, "an integer >= 1")
        # Whoever uses the other values checks them: before the first optimizer is played for nothing.
        for make in self.contenders().values():
            play(PROBLEMS[self.problem].slopes(1), make, self.alpha)

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """``betas``, or the problem's own."""
        return self.betas or ((0.0, 0.1) if self.problem == "theorem" else (0.95, 0.99))

    def contenders(self) -> dict[str, Make]:
        """The constructor of each optimizer by name, for a list of parameters."""
        betas = self.resolved_betas
        return {
            ADAM: partial(load_optimizer("adam"), betas=betas),
            AMSGRAD: partial(torch.optim.Adam, betas=betas, amsgrad=True),
            AVGRAD: partial(AVGrad, betas=betas, weight_decay=0.0),
            FROM_ADAM: self.learned(1.0),
            FROM_AVGRAD: self.learned(0.0),
        }

    def learned(self, start: float) -> Make:
        """MADA that learns ρ alone."""
        return partial(self._mada, rho=start)

    def held(self, rho: float) -> Make:
        """MADA at a fixed ρ, whose hypergradient is taken all the same: its box is a point."""
        return partial(self._mada, rho=rho, bounds={"rho": (rho, rho)})

    def _mada(self, params: list[nn.Parameter], **options: Any) -> Optimizer:
        options["hyper_lr"] = {"rho": self.hyper_lr}
        return MADA(params, betas=self.resolved_betas, weight_decay=0.0, hyper_delay=0, **options)

    @property
    def repetitions(self) -> int:
        """How often each optimizer is played: once for each seed, where chance is in it."""
        return self.seeds if PROBLEMS[self.problem].stochastic else 1

    def play(self, make: Make, on_step: OnStep = None) -> Traces:
        """Return one run for each seed; ``on_step`` is called after each step."""
        slopes = (PROBLEMS[self.problem].slopes(self.steps, seed) for seed in range(self.repetitions))
        return [play(each, make, self.alpha, self.projected, on_step) for each in slopes]


def steps_of(setting: Setting, scanned: bool) -> int:
    """Return how many steps :func:`summarize` takes, or :func:`scan`."""
    plays = len(setting.contenders())
    if scanned:
        plays = len(_scan_betas(setting)) * (len(_SCAN_HELD) + len(_SCAN_HYPER_LR) + 1)
    return setting.steps * setting.repetitions * plays


def summarize(setting: Setting, on_step: OnStep = None) -> Iterator[tuple[str, str, Traces]]:
    """Name, line of the table, and runs of each optimizer, as soon as it was played; the header comes first.

    >>> for _, line, _ in summarize(Setting("theorem", steps=300)):
    ...     print(line)
                       final iterate    average regret         final ρ
    Adam                        0.95             0.760            1.00
    AMSGrad                    -0.96             0.135
    AVGrad                     -0.94             0.196            0.00
    MADA from Adam              0.28             0.728            0.34
    MADA from ρ = 0            -0.93             0.204            0.26
    """
    yield "", _line("", "final iterate", "average regret", "final ρ"), ()
    for name, make in setting.contenders().items():
        traces = setting.play(make, on_step)
        yield name, _line(name, *(_with_interval(traces, kind) for kind in _DIGITS)), traces


def finals(traces: Traces) -> dict[str, list[float | None]]:
    """Return what the table is made of, by kind: one value for each run, None for a ρ that an optimizer lacks."""
    return {kind: [finite(value) for value in _finals(traces, kind)] for kind in _DIGITS}


def _line(name: str, iterate: str, regret: str, rho: str) -> str:
    # Two spaces stay, however wide a number is.
    return f"{name:<16}{'  ' + iterate:>16}{'  ' + regret:>18}{'  ' + rho:>16}".rstrip()


def scan(setting: Setting, on_step: OnStep = None) -> Iterator[str]:
    """Two tables in Markdown, line by line: where the iterate ends, ρ being learned, and ρ being held at some values.

    They go through lists of betas and step sizes of ρ in place of the setting's own. With ρ held, h is its mean
    hypergradient, times 1000.
    """
    held_rows = []
    from_adam = [f"{FROM_ADAM}, {hyper_lr:g}" for hyper_lr in _SCAN_HYPER_LR]
    yield from _header(ADAM, AVGRAD, *from_adam, f"{FROM_AVGRAD}, {setting.hyper_lr:g}")
    for betas in _scan_betas(setting):
        here = replace(setting, betas=betas)
        held = [here.play(here.held(rho), on_step) for rho in _SCAN_HELD]
        learned = [here.play(replace(here, hyper_lr=hyper_lr).learned(1.0), on_step) for hyper_lr in _SCAN_HYPER_LR]
        learned.append(here.play(here.learned(0.0), on_step))
        ends = [_mean(traces, "iterates") for traces in (held[0], held[-1])]
        yield _row(betas, *ends, *(f"{_mean(traces, 'iterates')} (ρ {_mean(traces, 'rho')})" for traces in learned))
        cells = (f"{_mean(traces, 'iterates')} (h {_mean(traces, 'hypergradient', 1e3)})" for traces in held)
        held_rows.append(_row(betas, *cells))
    yield ""
    yield from _header(*(f"ρ = {rho:g}" for rho in _SCAN_HELD))
    yield from held_rows


def _scan_betas(setting: Setting) -> list[tuple[float, float]]:
    return _SCAN_BETAS["theorem" if setting.problem == "theorem" else "periodic"]


def draw_online(setting: Setting, played: Mapping[str, Traces], path: Path) -> None:
    """Draw ``path``.png and .svg: iterate, average regret and ρ over the steps.

    A point of a line is the mean over seeds, and over the steps since the last point: a period, or some. The numbers at
    the ends are those of the table.

    Args:
        setting: what was played.
        played: the runs of each of ``setting.contenders()``, by name.
        path: where to write.
    """
    with style():
        figure = Figure(figsize=(8, 8.4), layout="constrained")
        iterate, regret, rho = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.2, 1))
        iterate.set(title="Iterate: the best is -1", ylim=(LOW - 0.05, HIGH + 0.05), yticks=(-1, -0.5, 0, 0.5, 1))
        _draw_paths(iterate, setting, played, "iterates")
        regret.set(title="Average regret")
        _draw_paths(regret, setting, played, "average_regret")
        rho.set(title="ρ, where it is learned", ylim=(-0.05, 1.05), xlabel="step")
        rho.set_yticks((0, 0.5, 1), ("AVGrad 0", "0.5", "Adam 1"))
        _draw_paths(rho, setting, {name: played[name] for name in (FROM_ADAM, FROM_AVGRAD)}, "rho")
        beta1, beta2 = setting.resolved_betas
        problem = PROBLEMS[setting.problem]
        when = f"with probability 1/{problem.period}" if problem.stochastic else f"in 1 of {problem.period} steps"
        figure.suptitle(
            f"{problem.rare:g}x {when}, else -{problem.common:g}x; β = ({beta1:g}, {beta2:g}), α = {setting.alpha:g}, "
            f"step size of ρ {setting.hyper_lr:g}"
            + (f"; means of {setting.seeds} seeds" if problem.stochastic else ""),
            x=0.01,
            ha="left",
            color="#555555",
            fontsize=10,
        )
        save_figure(figure, path)


def _draw_paths(axes: Axes, setting: Setting, played: Mapping[str, Traces], kind: str) -> None:
    period = PROBLEMS[setting.problem].period
    periods = max(1, setting.steps // period)
    numbers = sorted({round(periods ** (i / _POINTS)) for i in range(_POINTS + 1)})
    # What is left after the last whole period belongs to its point: by itself it would be a part of a swing.
    ends = [*(min(period * number, setting.steps) for number in numbers[:-1]), setting.steps]
    labels, lowest = [], math.inf
    for name, traces in played.items():
        values = torch.stack([getattr(trace, kind) for trace in traces]).mean(0)
        # Within a period the iterate goes up and down: without means one would see bands.
        path = [values[begin:end].mean().item() for begin, end in itertools.pairwise([0, *ends])]
        # Some coincide: each is thinner than the one below it.
        axes.plot(ends, path, color=_COLOURS[name], lw=2.6 - 0.3 * list(_COLOURS).index(name))
        final = _number(mean_interval(_finals(traces, kind))[0], _DIGITS[kind])
        labels.append(EndLabel(path[-1], f"{name}  {final}", _COLOURS[name]))
        lowest = min(lowest, *path)
    axes.set(xscale="log", xlim=(ends[0], max(ends[-1], ends[0] + 1)))
    scales: list[Axis] = [axes.xaxis]
    if kind == "average_regret":
        # Beside the first losses, which few steps share, nothing else would be seen on a linear scale.
        axes.set_yscale("log" if lowest > 0 else "symlog")
        scales += [axes.yaxis] if lowest > 0 else []
    for axis in scales:
        label_in_full(axis)
    label_ends(axes, labels)


def _finals(traces: Traces, kind: str) -> list[float]:
    """The mean of each run's last tenth: within a period, and where it is learned fast, a single value says little.

    An average regret, which is a mean already, is that of the last step.
    """
    if kind == "average_regret":
        return [trace.average_regret[-1].item() for trace in traces]
    return [getattr(trace, kind)[-max(1, len(trace.iterates) // 10) :].nanmean().item() for trace in traces]


def _with_interval(traces: Traces, kind: str) -> str:
    """Mean, and with several runs the half width of its 95 % confidence interval; nothing for what is not there."""
    values, digits = _finals(traces, kind), _DIGITS[kind]
    if any(map(math.isnan, values)):
        return ""
    mean, half = mean_interval(values)
    return _number(mean, digits) + ("" if half is None else f" ± {half:.{digits}f}")


def _mean(traces: Traces, kind: str, factor: float = 1.0) -> str:
    return _number(factor * mean_interval(_finals(traces, kind))[0], 2)


def _number(value: float, digits: int) -> str:
    # Without a zero's sign.
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _header(*names: str) -> Iterator[str]:
    yield "| β1, β2 | " + " | ".join(names) + " |"
    yield "| --- |" + " ---: |" * len(names)


def _row(betas: tuple[float, float], *cells: str) -> str:
    return f"| {betas[0]:g}, {betas[1]:g} | " + " | ".join(cells) + " |"
