"""The report as a page of HTML, with tables and interactive figures. It needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

import mada_optim
from mada_lab.report import plotly_figures
from mada_lab.report.coefficient_panels import panels
from mada_lab.report.joint_table import JointTable
from mada_lab.report.stage_report import StageReport
from mada_lab.report.tables import Table
from mada_lab.sweep.stage_folder import StoredStage
from mada_lab.tasks.registry import without_paths
from mada_lab.text import count

_STYLE = """
body { margin: 0; background: #fff; color: #222; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 1rem 1.5rem 3rem; }
h1 { font-size: 1.6rem; margin: 1rem 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.5rem; border-bottom: 2px solid #0072B2; padding-bottom: 0.3rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.3rem; }
p { margin: 0.3rem 0; }
p, footer, dl { color: #555; font-size: 0.9rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 0.5rem 0; }
dt { color: #222; font-weight: 600; }
dd { margin: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: right; border-bottom: 1px solid #e8e8e8; }
td { white-space: nowrap; }
th { vertical-align: bottom; border-color: #888; }
th:first-child, td:first-child { text-align: left; }
.problems { border-left: 4px solid #D55E00; background: #fdf3ec; padding: 0.5rem 1rem; margin: 1rem 0; }
.problems ul { margin: 0; padding-left: 1.2rem; font-size: 0.9rem; overflow-wrap: anywhere; }
.summary { border-left: 4px solid #0072B2; padding: 0.3rem 1rem; margin: 1rem 0; color: #222; font-size: 1rem; }
footer { margin-top: 3rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.9rem; color: #333; overflow-wrap: anywhere; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1rem 1.5rem; }
.small figure { display: flex; flex-direction: column; justify-content: flex-end; }
.keys { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0.4rem 0; }
.keys button { display: flex; align-items: center; gap: 0.4rem; border: 0; padding: 0.1rem 0; background: none; }
.keys button { color: #333; font: inherit; font-size: 0.8rem; text-align: left; cursor: pointer; }
.keys span { overflow-wrap: anywhere; }
.keys button[aria-pressed="false"] { opacity: 0.35; }
.keys svg { flex: none; }
"""
# A key that is clicked hides its lines in all figures of its block; clicked twice, all others.
_SCRIPT = """
{
  const keys = (block) => [...block.querySelectorAll(".keys button")];
  const press = (key, shown) => key.setAttribute("aria-pressed", shown);
  const isPressed = (key) => key.getAttribute("aria-pressed") === "true";
  const show = (block) => {
    const hidden = new Set(keys(block).filter((key) => !isPressed(key)).map((key) => key.dataset.group));
    for (const plot of block.querySelectorAll(".js-plotly-plot"))
      Plotly.restyle(plot, { visible: plot.data.map((trace) => !hidden.has(trace.legendgroup)) });
  };
  for (const kind of ["click", "dblclick"])
    document.addEventListener(kind, (event) => {
      const key = event.target.closest(".keys button");
      if (key === null) return;
      const block = key.closest(".block");
      const alone = keys(block).every((other) => isPressed(other) === (other === key));
      if (kind === "click") press(key, !isPressed(key));
      else keys(block).forEach((other) => press(other, alone || other === key));
      show(block);
    });
}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
<footer>Made from stored metrics by mada report, mada-optim {version}.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""

# In a key, as stroke-dasharray, by plotly's name.
_DASHES = {"solid": "none", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}
# Nothing leaves the page: plotly would offer to share a figure through its maker's site.
_PLOT_OPTIONS = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}


def html_page(title: str, summary: Sequence[str], reports: Sequence[StageReport], joint: JointTable | None) -> str:
    """Return the page: a summary, the table of several experiments, then everything about each stage."""
    contents = "".join(
        f'<li><a href="#s{number}">{escape(report.stage.title)}</a></li>' for number, report in enumerate(reports)
    )
    body = [f'<p class="summary">{escape(sentence)}</p>' for sentence in summary]
    body += [f"<nav><ul>{contents}</ul></nav>"] if len(reports) > 1 else []
    if joint is not None:
        body += [_table(joint.table), *(f"<p>{escape(note)}</p>" for note in joint.notes)]
    for number, report in enumerate(reports):
        heading = f"<h2>{escape(report.stage.title)}</h2>" if len(reports) > 1 else ""
        body.append(f'<section id="s{number}">\n{heading}')
        body += _section(report, f"s{number}")
        body.append("</section>")
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        script=_SCRIPT,
        plotly=get_plotlyjs(),
        body="\n".join(body),
        version=mada_optim.__version__,
    )


def _section(report: StageReport, name: str) -> Iterator[str]:
    """Yield everything about one stage. Its figures are elements ``name``-0, ``name``-1 and so on."""
    yield _facts(report.stage)
    if problems := report.problems():
        items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        yield f'<div class="problems"><ul>{items}</ul></div>'
    if not report.stage.runs:
        return
    for title, table in report.tables().items():
        yield f"<h3>{escape(title)}</h3>\n{_table(table)}"
    yield from (f"<p>{escape(note)}</p>" for note in report.notes())
    for number, (title, caption, figures) in enumerate(_figures(report)):
        yield f"<h3>{escape(title)}</h3>\n<p>{escape(caption)}</p>\n{_block(figures, f'{name}-{number}')}"


def _block(figures: go.Figure | Sequence[plotly_figures.Small], name: str) -> str:
    """Return a figure, or small ones side by side, as many as there is room for, under the keys that they share."""
    several = [plotly_figures.Small("", figures)] if isinstance(figures, go.Figure) else figures
    keys = "".join(
        f'<button data-group="{escape(key.group)}" aria-pressed="true">{_swatch(key)}<span>{key.label}</span></button>'
        for key in plotly_figures.keys([small.figure for small in several])
    )
    drawn = []
    for number, (title, figure) in enumerate(several):
        element = name if isinstance(figures, go.Figure) else f"{name}-{number}"
        options = {"include_plotlyjs": False, "full_html": False, "div_id": element}
        # plotly's own keys would be cut where they are longer than a narrow window.
        plot = to_html(figure.update_layout(showlegend=False), config=_PLOT_OPTIONS, **options)
        drawn.append(f"<figure>{f'<figcaption>{escape(title)}</figcaption>' if title else ''}{plot}</figure>")
    kind = "whole" if isinstance(figures, go.Figure) else "small"
    return f'<div class="block"><div class="keys">{keys}</div><div class="{kind}">\n{"".join(drawn)}</div></div>'


def _swatch(key: plotly_figures.Key) -> str:
    line = f'<line x2="26" y1="4" y2="4" stroke="{key.colour}" stroke-dasharray="{_DASHES[key.dash]}"/>'
    return f'<svg width="26" height="8" stroke-width="{key.width}" opacity="{key.opacity}">{line}</svg>'


def _figures(report: StageReport) -> Iterator[tuple[str, str, go.Figure | Sequence[plotly_figures.Small]]]:
    """Yield title, caption, and a figure or several small ones."""
    stage = report.stage
    if stage.described["stage"] is None:
        yield (
            "Losses over steps",
            "Training: the mean over neighbouring steps, and each step faintly.",
            plotly_figures.losses(stage.runs[0]),
        )
    else:
        over = "seeds and starts" if report.betas else "seeds"
        caption = f"Mean over {over}, in their range. Click on a name to hide it, twice to see it alone."
        without = [contender.label for contender in stage.contenders if contender.best_lr() is None]
        if without:
            caption += f" Not shown, for at each learning rate a run diverged: {', '.join(without)}."
        yield "Validation loss at each best learning rate", caption, plotly_figures.curves(stage.contenders)
        caption = (
            "A point for each run; lines or dashes: means, where no run diverged. Crosses at the top: runs that "
            "diverged, or ended with a higher loss than they began with."
        )
        yield "Final validation losses", caption, plotly_figures.finals(stage.contenders)
    for name, meaning in plotly_figures.LOSSES.items():
        if report.betas:
            title = f"Final {meaning} loss over the start of the betas"
            yield (
                title,
                "Means over seeds. Dots: the starts. Crosses: a run diverged.",
                plotly_figures.contours(report.betas, name),
            )
    for panel in panels(stage.contenders):
        fixed = f" Not moved: {panel.fixed}." if panel.fixed else ""
        caption = f"A line for each run{', coloured by where it starts' if panel.ordered else ''}.{fixed}"
        yield ": ".join(filter(None, ("Paths of the coefficients", panel.title))), caption, plotly_figures.paths(panel)


def _facts(stage: StoredStage) -> str:
    """Return what was run, and on what."""
    base = stage.described["base"]
    task = {name: value for name, value in without_paths(base["task"]).items() if name != "kind"}
    training = {name: value for name, value in base.items() if name not in ("task", "optimizer", "seed")}
    over = [run for run in stage.runs if run.result.status != "interrupted"]
    facts = {
        "task": f"{base['task']['kind']}: {_listed(task)}",
        "data": _distinct([_listed(_data(record["data"])) for record in stage.records]),
        "training": _listed(training),
        "learning rates": ", ".join(f"{lr:g}" for lr in stage.lrs),
        "seeds": ", ".join(map(str, stage.seeds)),
        "runs": f"{len(over)} of {stage.total} are over",
        "versions": _distinct([_listed(record["versions"]) for record in stage.records]),
        "machine": _distinct([_listed(record["machine"]) for record in stage.records]),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{escape(fact)}</dd>' for name, fact in facts.items() if fact)}</dl>"


def _data(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of the data. A vocabulary of characters is stored whole; here its size will do."""
    vocabulary = described.get("vocabulary")
    size = len(vocabulary) if isinstance(vocabulary, str) else vocabulary
    return {**described, "task": None, "vocabulary": size}


def _listed(values: Mapping[str, Any]) -> str:
    """Return names and values as text.

    >>> _listed({"eval_every": 5, "gpu": None, "train": {"tokens": 100}})
    'eval every 5, train (tokens 100)'
    """
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    # Of a sha256, the beginning is enough to tell data apart.
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _distinct(texts: Sequence[str]) -> str:
    """Return the texts, with how many runs there are of each where they differ.

    >>> _distinct(["a", "b", "a"])
    'a (2 runs); b (1 run)'
    """
    counts = Counter(texts)
    if len(counts) < 2:
        return "".join(counts)
    return "; ".join(f"{text} ({count(number, 'run')})" for text, number in counts.most_common())


def _table(table: Table) -> str:
    (header, *rows) = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table></div>'
