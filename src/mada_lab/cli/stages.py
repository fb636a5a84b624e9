"""What ``mada compare`` and ``mada sweep`` share: they train the runs of stages, and print what is stored of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mada_lab.sweep.experiment import Experiment


def train_stages(
    experiment: Experiment, folders: Mapping[str, Path], out: Path, arguments: argparse.Namespace, **choice: Any
) -> int:
    """Train what is not over yet. Return the exit code: 0, 1 where something could not be trained, 130 after Ctrl-C.

    Args:
        experiment: what is trained.
        folders: of each stage, by its name.
        out: the folder that the user gave.
        arguments: of the command line, with ``workers`` and ``address``.
        choice: ``only`` and ``stages`` of :func:`mada_lab.sweep.stages.run_stages`.
    """
    from rich.console import Console

    from mada_lab.display.progress import SweepDisplay
    from mada_lab.sweep.stages import run_stages

    console = Console(soft_wrap=True, highlight=False, markup=False)
    with SweepDisplay(console) as display:
        choice |= {"address": arguments.address, "on_kept": display.kept, "on_progress": display.progress}
        ending = run_stages(experiment, folders, arguments.workers, display, **choice)
    for name, why in ending.failed.items():
        print(f"mada: {name} {why}", file=sys.stderr)
    for reason in ending.left_out:
        print(f"mada: left out: {reason}", file=sys.stderr)
    if ending.interrupted:
        console.print(f"Interrupted. The same command with --out {out} goes on.")
        return 130
    return 1 if ending.failed or ending.left_out else 0


def print_report(folder: Path, reference: str | None = None, option: str = "--lrs") -> dict[str, Any]:
    """Print what is stored of a stage. Return the content of its results.json, with the summary.

    Args:
        folder: of the stage.
        reference: label of the contender that the tables compare with; None: adamw.
        option: where a user adds learning rates, for the warning about the edge of a grid.
    """
    from rich.console import Console
    from rich.table import Table

    from mada_lab.report.summary import curves_table, edge_warnings, verdict
    from mada_lab.sweep.stage_folder import load_stage
    from mada_lab.sweep.stages import make_report
    from mada_lab.tasks.stored import read_json

    tables, notes = make_report(folder, reference)
    stage = load_stage(folder, reference)
    if len(stage.runs) > 1:
        tables.append(curves_table(stage.summaries))
    console = Console()
    for header, *rows in tables:
        table = Table(box=None, header_style="bold", pad_edge=False)
        # Headers are broken between words, numbers are not.
        cells = [(*name.split(), *column) for name, *column in zip(header, *rows, strict=True)]
        widths = [max(map(len, texts)) for texts in cells]
        for index, (name, width) in enumerate(zip(header, widths, strict=True)):
            table.add_column(name, justify="right" if index else "left", width=width)
        for row in rows:
            table.add_row(*row)
        # In a narrow terminal rich would leave out what has no room.
        console.width = max(console.width, sum(widths) + 2 * len(widths))
        console.print(table)
        console.print()
    console = Console()
    for note in notes:
        console.print(note, highlight=False, markup=False)
    written = f"Written: {folder}/table.md, results.json, curves.png"
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    sentence = verdict(stage.entries, stage.reference)
    console.print(f"\n{sentence}", highlight=False, markup=False)
    for warning in edge_warnings(stage.entries, option):
        print(f"mada: {warning}", file=sys.stderr)
    results: dict[str, Any] = {**read_json(folder / "results.json"), "summary": sentence}
    return results
