"""``mada report``: what is stored, as one file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mada_lab.cli.option_groups import DRAWING, add_reference
from mada_lab.cli.options import Outcome, split_labels

SUMMARY = "show what is stored as one file, with tables and interactive figures"
EPILOG = """\
examples:
  mada report runs/shakespeare                    both stages of a sweep
  mada report runs/grid runs/digits/confirm runs/one --out all.html
  mada report runs/shakespeare runs/cifar --out all.md
  mada report runs/shakespeare/tune runs/cifar/tune --only adamw,muon --out rates.png
  mada report runs/untuned-* --untuned --out untuned.md

Several experiments are compared in one table, too. The file needs no network. Figures for papers are beside the tables
of each stage: mada compare --report FOLDER.
"""
NEEDS = (*DRAWING, "plotly")


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a sweep, of a stage or comparison, or of a run"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="Markdown, tables only, where it ends in .md; a figure of final losses over learning rates, a panel for "
        "each task, where it ends in .png (default: report.html in the first folder, or here where that cannot be "
        "written to)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="LABEL,...",
        default=[],
        help="what the figure, or --untuned, shows, in this order (default: all); may be given again",
    )
    parser.add_argument(
        "--untuned",
        action="store_true",
        default=False,
        help="tables of what optimizers give at their defaults beside what tuning gives, for sweeps as those in "
        "experiments/untuned; --out NAME.md",
    )
    add_reference(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.errors import InputError, require
    from mada_lab.report.rates_figure import write_rates
    from mada_lab.report.untuned import write_untuned

    try:
        from mada_lab.report.report_file import write_report
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install 'mada-optim[lab]'") from None

    folders = [Path(folder) for folder in arguments.folders]
    default = (folders[0] if os.access(folders[0], os.W_OK) else Path()) / "report.html"
    out = Path(getattr(arguments, "out", default))
    if out.suffix == ".png":
        only = split_labels(arguments.only, _labels(folders)) if arguments.only else None
        written = write_rates(folders, out, only)
        print(f"Written: {', '.join(map(str, written))}")
        return 0, {"files": written}
    if arguments.untuned:
        require(out.suffix == ".md", "out", str(out), "the name of a Markdown file, NAME.md, with untuned")
        labels = split_labels(arguments.only, _labels(folders)) if arguments.only else None
        write_untuned(folders, out, labels, getattr(arguments, "reference", None))
        print(f"Written: {out}")
        return 0, {"file": out}
    require(not arguments.only, "only", arguments.only, "left out: it is for a figure, --out NAME.png, or --untuned")
    summary = write_report(folders, out, getattr(arguments, "reference", None))
    print(f"Written: {out}")
    return 0, {"file": out, "summary": summary}


def _labels(folders: Sequence[Path]) -> set[str]:
    """Return the labels of the stages in folders, of which each is that of a stage or of a sweep."""
    from mada_lab.files import read_json

    files = (file for folder in folders for file in (*folder.glob("stage.json"), *folder.glob("*/stage.json")))
    return {label for file in files for label in read_json(file).get("contenders", ())}
