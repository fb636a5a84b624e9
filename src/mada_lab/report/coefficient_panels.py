"""Paths of the coefficients as figures show them: which runs stand together, and what each line is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mada_lab.run.curves import coefficient_points
from mada_lab.run.stored import StoredRun
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_optim.history.drawing import Points, axis_limits, moves
from mada_optim.history.notation import SYMBOLS

# As many points as a small plot can show, and as many contenders as there are colours.
_POINTS, _TOGETHER = 200, 7


@dataclass(frozen=True)
class Line:
    """A run.

    Args:
        group: number of the lines of one colour.
        label: of the group.
        run, seed: of the run.
        diverged: it did.
        points: step and value, by coefficient.
    """

    group: int
    label: str
    run: str
    seed: int
    diverged: bool
    points: Mapping[str, Points]


@dataclass(frozen=True)
class Panel:
    """Small plots that belong together, one for each coefficient.

    Args:
        title: names the contender; empty: there are several, and groups are named after them.
        lines: their runs, at the learning rate where they are shown.
        ordered: groups are starts in ascending order, and not names.
    """

    title: str
    lines: Sequence[Line]
    ordered: bool = False

    @property
    def groups(self) -> dict[int, str]:
        """Labels of the groups."""
        return {line.group: line.label for line in self.lines}

    @property
    def moving(self) -> list[str]:
        """Coefficients that move in any run."""
        names = dict.fromkeys(name for line in self.lines for name in line.points)
        return [name for name in names if any(moves(line.points.get(name, ())) for line in self.lines)]

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """The range of the axis of each coefficient that moves: all that it goes through, and no less than it takes to
        tell a change from a jitter.

        >>> points = {"rho": [(1, 0.5), (2, 0.5001)], "scale": [(1, 1e-4), (2, 1e-2)]}
        >>> limits = Panel("mada", [Line(0, "mada", "mada-seed0", 0, False, points)]).limits
        >>> {name: [float(f"{end:.2g}") for end in ends] for name, ends in limits.items()}
        {'rho': [0.45, 0.55], 'scale': [7.9e-05, 0.013]}
        """
        return {
            name: axis_limits([v for line in self.lines for _, v in line.points.get(name, ())], name)
            for name in self.moving
        }

    @property
    def fixed(self) -> str:
        """The coefficients that do not move, as text, with all values that they have.

        >>> points = {"rho": [(1, 0.5), (2, 0.4)], "c": [(1, 1.0), (2, 1.0)]}
        >>> Panel("mada", [Line(0, "mada", "mada-seed0", 0, False, points)]).fixed
        'c = 1'
        """
        moving = self.moving
        values: dict[str, set[float]] = {}
        for line in self.lines:
            for name in (name for name in line.points if name not in moving):
                values.setdefault(name, set()).add(line.points[name][0][1])
        texts = {name: " or ".join(f"{value:g}" for value in sorted(several)) for name, several in values.items()}
        return ", ".join(f"{SYMBOLS.get(name, name)} = {text}" for name, text in texts.items())


def panels(contenders: Sequence[ContenderRuns]) -> list[Panel]:
    """Return the paths of all contenders that learn.

    Those that always start at the same place stand together, a colour for each; if there is only one, its runs have a
    colour each. One that starts at several places has a panel for itself, with a colour for each start.
    """
    together: list[Panel] = []
    alone: list[Panel] = []
    for index, contender in enumerate(contenders):
        lr = contender.shown_lr()
        title = f"{contender.label}, lr {lr:g}"
        runs = [(run, points) for run in contender.at(lr) if (points := coefficient_points(run.metrics))]
        starts = _starts([points for _, points in runs])
        order = sorted(set(starts))
        if len(order) > 1:
            lines = [_line(order.index(start), start[1], *item) for item, start in zip(runs, starts, strict=True)]
        else:
            lines = [_line(index, title, *item) for item in runs]
        panel = Panel(title, lines, ordered=len(order) > 1)
        if panel.moving:
            (alone if panel.ordered else together).append(panel)
    if len(together) == 1:
        together = [_coloured_by_run(together[0])]
    chunks = [together[first : first + _TOGETHER] for first in range(0, len(together), _TOGETHER)]
    joined = [
        chunk[0] if len(chunk) == 1 else Panel("", [line for panel in chunk for line in panel.lines])
        for chunk in chunks
    ]
    return joined + alone


def _starts(paths: Sequence[Mapping[str, Points]]) -> list[tuple[tuple[float, ...], str]]:
    """Return where each run starts, as numbers and as text, in the coefficients in which any two of them differ there.

    >>> low, high = {"rho": [(1, 0.0)], "c": [(1, 1.0)]}, {"rho": [(1, 0.5)], "c": [(1, 1.0)]}
    >>> _starts([low, high])
    [((0.0,), 'ρ 0'), ((0.5,), 'ρ 0.5')]
    """
    firsts = [{name: points[0][1] for name, points in path.items()} for path in paths]
    names = [name for name in (firsts[0] if firsts else ()) if len({first.get(name) for first in firsts}) > 1]
    return [
        (
            tuple(first[name] for name in names),
            ", ".join(f"{SYMBOLS.get(name, name)} {first[name]:g}" for name in names),
        )
        for first in firsts
    ]


def _line(group: int, label: str, run: StoredRun, points: Mapping[str, Points]) -> Line:
    every = -(-max(map(len, points.values())) // _POINTS)
    thin = {name: [*path[:-1:every], path[-1]] for name, path in points.items()}
    return Line(group, label, run.name, run.seed, run.result.status == "diverged", thin)


def _coloured_by_run(panel: Panel) -> Panel:
    # An axis that changes neither the start nor the learning rate gives several runs one seed.
    seeds_differ = len({line.seed for line in panel.lines}) == len(panel.lines)
    labels = [f"seed {line.seed}" if seeds_differ else line.run for line in panel.lines]
    lines = [dataclasses.replace(panel.lines[i], group=i, label=label) for i, label in enumerate(labels)]
    return dataclasses.replace(panel, lines=lines)
