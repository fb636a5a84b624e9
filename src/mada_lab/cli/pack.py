"""``mada pack``: what a sweep found, in one small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from mada_lab.cli.options import Outcome

SUMMARY = "put what a sweep found into one small file"
EPILOG = """\
examples:
  mada pack runs/shakespeare --out shakespeare.tar.gz
  mkdir again && tar -xzf shakespeare.tar.gz -C again && mada report again

Configurations, results and curves of the runs that are over; no weights. mada sweep --out again goes on from there.
"""
NEEDS = ("numpy",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    parser.add_argument("folder", metavar="FOLDER", help="of a sweep, of a stage or comparison")
    parser.add_argument("--out", metavar="FILE", help="(default: the folder's name with .tar.gz, here)")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.sweep.archive import pack

    folder = Path(arguments.folder)
    out = Path(getattr(arguments, "out", f"{folder.resolve().name}.tar.gz"))
    runs = pack(folder, out)
    print(f"Written: {out}, {runs} runs, {out.stat().st_size / 1024:.0f} KiB")
    return 0, {"file": out, "runs": runs}
