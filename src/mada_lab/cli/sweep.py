"""``mada sweep``: the experiment that a file describes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mada_lab.cli.option_groups import TRAINING, add_workers
from mada_lab.cli.options import Outcome, new_folder, split_labels
from mada_lab.cli.stages import print_report, train_stages

SUMMARY = "run the experiment that a file describes"
EPILOG = """\
examples:
  mada sweep experiments/shakespeare.toml --data-root data --out runs/shakespeare --workers 2
  mada sweep experiments/shakespeare.toml --data-root data --out runs/shakespeare --only adamw,mada --stage tune
  mada sweep experiments/shakespeare.toml --data-root data --out runs/small --set steps=50 --set task.width=64

A sweep that was interrupted goes on with the same command, and more contenders and values may be added to its file.
docs/experiments.md says what may stand in one.
"""
NEEDS = TRAINING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    parser.add_argument("file", metavar="FILE", help="an experiment in TOML")
    parser.add_argument("--out", metavar="DIR", help="new, or of this experiment (default: runs/TIME-NAME)")
    parser.add_argument(
        "--data-root", metavar="DIR", default=".", help="where relative paths of data are looked up (default: here)"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="LABEL,...",
        default=[],
        help="contenders to train (default: all); may be given again",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        dest="changes",
        default=[],
        help="another value for a field of [base]; may be given again",
    )
    parser.add_argument("--stage", choices=("tune", "confirm"), default=None, help="(default: both)")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.sweep.experiment_file import load
    from mada_lab.sweep.stage_folder import CONFIRM, TUNE

    experiment = load(arguments.file, arguments.data_root, arguments.changes)
    out = Path(getattr(arguments, "out", None) or new_folder(Path(arguments.file).stem))
    folders = {stage: out / stage for stage in (TUNE, CONFIRM)}
    only = split_labels(arguments.only, experiment.contenders)
    stages = [arguments.stage] if arguments.stage else list(folders)
    code = train_stages(experiment, folders, out, arguments, only=only, stages=stages)
    results: dict[str, Any] = {"folder": out}
    if code != 130:
        for stage, folder in folders.items():
            if any(folder.glob("runs/*/result.json")):
                print(f"\n{experiment.title}: {stage}\n")
                results[stage] = print_report(folder, option="to lr in its file")
    return code, results
