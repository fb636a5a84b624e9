"""How optimizers show themselves in notebooks: small tables, made of what their text shows."""

from __future__ import annotations

import html
from collections.abc import Sequence

from torch import Tensor

from mada_optim.history import readings
from mada_optim.history.notation import RATE, SYMBOLS
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.scale import LearnedScale

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header, and rows of as many cells."""


def as_html(heading: str, tables: Sequence[Table]) -> str:
    """Return a heading and tables as HTML, which looks the same in light and dark notebooks.

    >>> as_html("a < b", [(("x",), [("1",)])])
    '<div><b>a &lt; b</b><table><tr><th>x</th></tr><tr><td>1</td></tr></table></div>'
    """
    parts = [f"<b>{html.escape(heading)}</b>"]
    for header, rows in tables:
        lines = [_line("th", header), *(_line("td", row) for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
    return f"<div>{''.join(parts)}</div>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def optimizer_as_html(optimizer: HypergradientOptimizer) -> str:
    """Coefficients and whether they are learned, learning rates, parameter groups."""
    tables: list[Table] = []
    per_group = optimizer.defaults["hyper_per_group"]
    for index, group in enumerate(optimizer.param_groups if per_group else optimizer.param_groups[:1]):
        heading = f"coefficient of group {index}" if per_group else "coefficient"
        step_sizes = group["hyper_lr"]
        rows = [
            (_named(name), f"{value:g}", f"learned, hyper_lr {step_sizes[name]:g}" if step_sizes[name] else "fixed")
            for name, value in optimizer.coefficients(index).items()
        ]
        tables.append(((heading, "value", ""), rows))
    if optimizer.scale is not None:
        tables.append(_found(optimizer.scale))
    groups = [
        (str(index), str(len(group["params"])), f"{group['weight_decay']:g}")
        for index, group in enumerate(optimizer.param_groups)
    ]
    tables.append((("parameter group", "parameters", "weight decay"), groups))
    tables.append(_in_use(optimizer))
    return as_html(type(optimizer).__name__, tables)


def scale_as_html(scale: LearnedScale) -> str:
    """What was found, or how far the search is."""
    return as_html("LearnedScale", [_found(scale)])


def _named(name: str) -> str:
    return f"{SYMBOLS[name]} {name}" if SYMBOLS.get(name, name) != name else name


def _found(scale: LearnedScale) -> Table:
    state = f"so far, after {scale.steps} steps" if scale.searching else f"found in {scale.steps} steps"
    return ("learning rate", state), [(str(kind), f"{value:.3g}") for kind, value in scale.values.items()]


def _in_use(optimizer: HypergradientOptimizer) -> Table:
    rates = readings.learning_rates(optimizer).items()
    cells = [
        (name.removeprefix(f"{RATE}_"), f"{float(rate) if isinstance(rate, Tensor) else rate:.3g}")
        for name, rate in rates
    ]
    return ("learning rate", "in use"), cells
