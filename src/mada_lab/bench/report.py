"""The table and the figure of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mada_lab.bench.measure import Result
from mada_lab.figures import save_figure
from mada_optim.history.drawing import PALETTE, style

HEADER = ("optimizer", "ratio", "quartiles", "ms", "words", "of copy", "state", "memory", "values")
COLOURS = {"ours": PALETTE[0], "torch": PALETTE[1], "peer": "#999999"}
MAKERS = {"ours": "mada-optim", "torch": "torch", "peer": "other packages"}


def row(result: Result, described: dict[str, Any], baseline: Result | None) -> tuple[str, ...]:
    """What the table shows of one result: see ``HEADER``."""
    share = result.bandwidth / described["copy_bandwidth"] if result.bandwidth else None
    memory = (
        result.peak_memory / baseline.peak_memory
        if result.peak_memory and baseline is not None and baseline.peak_memory
        else None
    )
    return (
        result.name,
        f"{result.ratio:.2f}",
        f"{result.low:.2f}-{result.high:.2f}",
        f"{1e3 * result.seconds:.{1 if result.seconds >= 1e-3 else 3}f}",
        "" if result.words is None else f"{result.words:.1f}",
        "" if share is None else f"{share:.0%}",
        "" if result.state_words is None else f"{result.state_words:.1f}",
        "" if memory is None else f"{memory:.2f}",
        "" if result.singular_values is None else "{:.2f}-{:.2f}".format(*result.singular_values),
    )


def markdown(described: dict[str, Any], results: Sequence[Result]) -> str:
    """Tables for all workloads, with what they were measured on."""
    lines = [
        "# What a step costs",
        "",
        "As a ratio to torch's fused AdamW, or to what the title names, timed in turn (median, quartiles); words: "
        "float32 numbers that a step must move for each parameter; of copy: the bandwidth that this amounts to, as a "
        "share of a copy's; state: float32 numbers kept for each parameter; memory: peak of the whole training, as a "
        "ratio; values: singular values of the orthogonalized matrices.",
        "",
        f"{described['date']}, {described['device']}, {described['threads']} threads, copy "
        f"{described['copy_bandwidth'] / 1e9:.0f} GB/s, "
        + ", ".join(f"{name} {number}" for name, number in described["versions"].items()),
    ]
    for letter in dict.fromkeys(result.workload for result in results):
        mine = [result for result in results if result.workload == letter]
        lines += ["", f"## ({letter}) {mine[0].title}", ""]
        lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(row(result, described, mine[0])) + " |" for result in mine]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of all ratios, one panel for each workload, on a logarithmic scale."""
    letters = list(dict.fromkeys(result.workload for result in results))
    rows = [[result for result in results if result.workload == letter] for letter in letters]
    with style():
        figure = Figure(figsize=(8, 0.9 + sum(0.9 + 0.24 * len(mine) for mine in rows)), layout="constrained")
        panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[len(mine) + 2 for mine in rows])[:, 0]
        for axes, letter, mine in zip(panels, letters, rows, strict=True):
            places = range(len(mine))
            axes.barh(
                places, [result.ratio for result in mine], color=[COLOURS[result.kind] for result in mine], left=0
            )
            axes.set_yticks(places, [result.name for result in mine])
            axes.invert_yaxis()
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(0.5, 2.2 * max(result.ratio for result in mine))
            axes.axvline(1.0, color="#444444", linewidth=1)
            axes.grid(axis="y", visible=False)
            for place, result in zip(places, mine, strict=True):
                axes.annotate(
                    f"{result.ratio:.2f}", (result.ratio, place), (4, 0), textcoords="offset points", va="center"
                )
            axes.set_title(f"({letter}) {mine[0].title}")
        panels[-1].set_xlabel("time of a step by that of torch's AdamW")
        handles = [Patch(color=colour, label=MAKERS[kind]) for kind, colour in COLOURS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        save_figure(figure, path)
