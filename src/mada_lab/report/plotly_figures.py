"""Interactive figures of what is stored, drawn with plotly for the report. Losses are in nats."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go

from mada_lab.figures import smoothed, spaced
from mada_lab.report.coefficient_panels import Panel
from mada_lab.report.stage_figures import colour_levels, panel_looks
from mada_lab.run.curves import loss_points
from mada_lab.run.stored import StoredRun
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.text import loss_or_diverged
from mada_optim.history.drawing import DASHES, look
from mada_optim.history.notation import SYMBOLS, is_logarithmic

LOSSES = {"train_loss": "training", "val_loss": "validation"}
_PLOTLY_DASHES = dict(zip(DASHES, ("solid", "dash", "dot", "dashdot"), strict=True))
_AXIS = {
    "gridcolor": "#e8e8e8",
    "linecolor": "#888888",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#888888",
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8},
}


def curves(contenders: Sequence[ContenderRuns]) -> go.Figure:
    """Validation losses over steps, each contender at its best learning rate: the mean over seeds, in their range."""
    figure = _figure(440, "step", "validation loss", hovermode="x unified")
    late = []
    for number, contender in enumerate(contenders):
        steps, means, lows, highs = contender.band()
        if not steps:
            continue
        colour, line = _line(look(number))
        name = {"name": _text(f"{contender.label}, lr {contender.best_lr():g}"), "legendgroup": str(number)}
        if lows != highs:
            around = {"x": [*steps, *steps[::-1]], "y": [*highs, *lows[::-1]], "fill": "toself", "mode": "none"}
            faint = {"fillcolor": colour, "opacity": 0.15, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(**around, **faint, **name)
        figure.add_scatter(x=steps, y=means, mode="lines", line=line, hovertemplate="%{y:.4f}", **name)
        # Beside the first steep fall, or a single run that goes wrong, differences would not be seen.
        first = 0.15 * steps[-1]
        late += [loss for losses in (lows, means) for step, loss in zip(steps, losses, strict=True) if step >= first]
    figure.update_yaxes(range=_around(late))
    return figure


def finals(contenders: Sequence[ContenderRuns]) -> go.Figure:
    """Final validation losses, a point for each run: over learning rates, or over contenders that have one rate each.

    Lines, in the second case dashes, are means. Crosses at the top are runs that diverged, or ended with a higher loss
    than they began with.
    """
    over_lrs = any(len(contender.lrs()) > 1 for contender in contenders)
    figure = _figure(440, "learning rate" if over_lrs else "", "final validation loss", hovermode="closest")
    shown = []
    for number, contender in enumerate(contenders):
        colour, line = _line(look(number))
        group = {"name": _text(contender.label), "legendgroup": str(number)}
        places = {lr: lr if over_lrs else _text(f"{contender.label}, lr {lr:g}") for lr in contender.lrs()}
        style = {"mode": "lines", "line": line} if over_lrs else {"mode": "markers", "marker": _dash(colour)}
        means = [contender.mean_final(lr) for lr in places]
        figure.add_scatter(x=list(places.values()), y=means, hovertemplate="mean %{y:.4f}", **style, **group)
        good = [run for run in contender.runs if _learned(run)]
        bad = [run for run in contender.runs if not _learned(run)]
        heights = [run.result.val_loss or 0.0 for run in good]
        shown += heights
        for runs, at, marker, axis in (
            (good, heights, {"symbol": "circle", "size": 6}, "y"),
            (bad, [0.97] * len(bad), {"symbol": "x", "size": 9}, "y2"),
        ):
            if runs:
                figure.add_scatter(
                    x=[places[run.lr] for run in runs],
                    y=at,
                    mode="markers",
                    marker={"color": colour, "opacity": 0.7, **marker},
                    yaxis=axis,
                    hovertext=[_text(_final(run)) for run in runs],
                    hoverinfo="text+name",
                    showlegend=False,
                    **group,
                )
    if over_lrs:
        lrs = spaced(sorted({lr for contender in contenders for lr in contender.lrs()}))
        figure.update_xaxes(type="log", tickvals=lrs, ticktext=[f"{lr:g}" for lr in lrs])
    figure.update_layout(showlegend=over_lrs)
    figure.update_yaxes(range=_around(shown))
    # Heights on this axis are shares of the plot's, at any zoom.
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})
    return figure


class Small(NamedTuple):
    """One of several small figures that belong together, and its title, which is no part of it."""

    title: str
    figure: go.Figure


def contours(entries: Sequence[Mapping[str, Any]], name: str) -> list[Small]:
    """Final losses over where the betas start, a figure for each contender, all in the same colours.

    Dots are the starts, crosses those with a diverged run.

    Args:
        entries: as :func:`report.betas_results` makes them.
        name: one of ``LOSSES``.
    """
    levels = colour_levels(entries, name)
    return [
        Small(f"{entry['optimizer']}, lr {entry['lr']:g}", _contour(entry["starts"], name, levels)) for entry in entries
    ]


def _contour(starts: Sequence[Mapping[str, Any]], name: str, levels: Sequence[float]) -> go.Figure:
    figure = _figure(380, "β1", "β2", hovermode="closest")
    losses = {tuple(start["betas"]): start[name] for start in starts if name in start}
    beta1, beta2 = (sorted({start[axis] for start in losses}) for axis in (0, 1))
    if levels and len(beta1) > 1 and len(beta2) > 1:
        size = levels[1] - levels[0]
        figure.add_contour(
            x=beta1,
            y=beta2,
            z=[[losses.get((x, y)) for x in beta1] for y in beta2],
            # A start with a diverged run is a hole. Starts that are no grid leave holes that mean nothing.
            connectgaps=len(losses) < len(beta1) * len(beta2),
            contours={"start": levels[0], "end": levels[-1], "size": size},
            autocontour=False,
            line={"width": 0.5, "color": "#ffffff"},
            coloraxis="coloraxis",
            hoverinfo="skip",
        )
    for diverged, symbol in ((False, "circle"), (True, "x")):
        chosen = [start for start, loss in losses.items() if (loss is None) == diverged]
        figure.add_scatter(
            x=[x for x, _ in chosen],
            y=[y for _, y in chosen],
            mode="markers",
            marker={"color": "#333333", "size": 6, "symbol": symbol, "opacity": 0.7},
            cliponaxis=False,
            hovertext=[f"β1 {x:g}, β2 {y:g}: {loss_or_diverged(losses[x, y])}" for x, y in chosen],
            hoverinfo="text",
            showlegend=False,
        )
    bar = {
        "title": {"text": f"final {LOSSES[name]} loss", "side": "top"},
        **{"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 10, "tickformat": ".3~g", "nticks": 5},
    }
    limits = {"cmin": levels[0], "cmax": levels[-1]} if levels else {}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "reversescale": True, "colorbar": bar, **limits})
    return figure


def paths(panel: Panel) -> list[Small]:
    """Paths of the coefficients over steps, a figure for each, a line for each run. Crosses: it diverged there."""
    last = max(step for line in panel.lines for points in line.points.values() for step, _ in points)
    return [Small(SYMBOLS.get(name, name), _path(panel, name, last)) for name in panel.moving]


def _path(panel: Panel, name: str, last: int) -> go.Figure:
    figure = _figure(250, "step", "", hovermode="closest")
    looks = panel_looks(panel)
    named: set[int] = set()
    for run in (line for line in panel.lines if name in line.points):
        steps, values = zip(*run.points[name], strict=True)
        group = {"name": _text(run.label), "legendgroup": str(run.group)}
        colour, line = _line(looks[run.group], width=1.3)
        hover = f"{_text(run.run)}<br>step %{{x}}: %{{y:.4g}}<extra></extra>"
        first = run.group not in named
        named.add(run.group)
        shown = [float(f"{value:.7g}") for value in values]
        figure.add_scatter(x=steps, y=shown, mode="lines", line=line, hovertemplate=hover, showlegend=first, **group)
        if run.diverged:
            cross = {"symbol": "x", "size": 8, "color": colour}
            end = {"x": steps[-1:], "y": values[-1:], "hovertemplate": f"diverged<br>{hover}"}
            figure.add_scatter(**end, mode="markers", marker=cross, showlegend=False, **group)
    low, high = panel.limits[name]
    if is_logarithmic(name):
        # Without a format, plotly writes 2 for 0.02.
        figure.update_yaxes(type="log", tickformat=".3~g", range=[math.log10(low), math.log10(high)])
    else:
        figure.update_yaxes(range=[low, high])
    figure.update_xaxes(range=[0, last])
    return figure


@dataclass(frozen=True)
class Key:
    """What stands for the lines of one group beside their figures: ``label`` as HTML, ``dash`` as in plotly."""

    group: str
    label: str
    colour: str
    dash: str
    width: float
    opacity: float


def keys(figures: Sequence[go.Figure]) -> list[Key]:
    """Return the keys of the figures, each once; none for figures whose axis names the lines."""
    by_group: dict[str, Key] = {}
    for trace in (trace for figure in figures if figure.layout.showlegend is not False for trace in figure.data):
        if trace.legendgroup and trace.showlegend is not False:
            line = trace.line
            key = Key(trace.legendgroup, trace.name, line.color, line.dash or "solid", line.width, trace.opacity or 1.0)
            by_group.setdefault(trace.legendgroup, key)
    return list(by_group.values())


def losses(run: StoredRun) -> go.Figure:
    """Training and validation losses of one run over steps."""
    figure = _figure(440, "step", "loss", hovermode="x unified")
    points = loss_points(run.metrics, "loss")
    if points:
        steps, values = zip(*points, strict=True)
        smooth = smoothed(values, len(values) // 80)
        every = -(-len(steps) // 1000)
        colour, line = _line(look(0))
        raw = {"line": {"color": colour, "width": 0.7}, "opacity": 0.3, "hoverinfo": "skip"}
        faint = {"name": "training, each step", "legendgroup": "each step"}
        figure.add_scatter(x=steps[::every], y=values[::every], mode="lines", **raw, **faint)
        hover = {"hovertemplate": "%{y:.4f}", "name": "training", "legendgroup": "training"}
        figure.add_scatter(x=steps[::every], y=smooth[::every], mode="lines", line=line, **hover)
        figure.update_yaxes(range=_around([min(values), max(smooth[len(smooth) // 40 :])]))
    points = loss_points(run.metrics, "val_loss")
    steps, values = zip(*points, strict=True) if points else ((), ())
    _, line = _line(look(1))
    hover = {"hovertemplate": "%{y:.4f}", "name": "validation", "legendgroup": "validation"}
    figure.add_scatter(x=steps, y=values, mode="lines+markers", line=line, **hover)
    return figure


def _figure(height: int, x: str, y: str, hovermode: str) -> go.Figure:
    figure = go.Figure()
    _style(figure, height, hovermode=hovermode)
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def _style(figure: go.Figure, height: int, **layout: Any) -> None:
    figure.update_layout(
        template="none",
        height=height,
        margin={"t": 36, "r": 20, "b": 54, "l": 64},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#333333"},
        hoverlabel={"namelength": -1},
        **layout,
    )
    figure.update_xaxes(**_AXIS)
    figure.update_yaxes(**_AXIS)


def _line(looks: tuple[str, str], width: float = 2) -> tuple[str, dict[str, Any]]:
    """The colour, and the line in it."""
    colour, dashes = looks
    return colour, {"color": colour, "dash": _PLOTLY_DASHES[dashes], "width": width}


def _dash(colour: str) -> dict[str, Any]:
    """A marker that is a horizontal dash."""
    return {"symbol": "line-ew-open", "size": 26, "color": colour, "line": {"width": 2}}


def _text(label: str) -> str:
    """Escape a label: plotly reads some HTML in its texts."""
    return html.escape(label, quote=False)


def _around(values: Sequence[float]) -> list[float] | None:
    """A range of an axis with all of them in it."""
    if not values:
        return None
    margin = 0.05 * (max(values) - min(values)) or 0.05
    return [min(values) - margin, max(values) + margin]


def _learned(run: StoredRun) -> bool:
    before = next((loss for _, loss in loss_points(run.metrics, "val_loss")), math.inf)
    return run.result.val_loss is not None and run.result.val_loss <= before


def _final(run: StoredRun) -> str:
    start = "" if run.betas is None else f", β from {run.betas[0]:g}, {run.betas[1]:g}"
    return f"{loss_or_diverged(run.result.val_loss)}, lr {run.lr:g}, seed {run.seed}{start}"
