"""``mada scale``: the learning rate that a search comes to, beside the best."""

from __future__ import annotations

import argparse
from pathlib import Path

from mada_lab.cli.option_groups import DRAWING
from mada_lab.cli.options import Outcome, chosen
from mada_lab.cli.theory import add_figure, add_numbers, figure_files, values_from_the_user

SUMMARY = "draw the learning rate that a search comes to, beside the best"
EPILOG = """\
examples:
  mada scale
  mada scale --noise 0.1 --steps 5000 --out scale-5000
"""
NEEDS = DRAWING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    numbers = (
        ("condition", float, "largest over smallest curvature"),
        ("noise", float, "variance of a gradient's noise, for the table"),
        ("steps", int, "of the run"),
        ("seeds", int, "searches for each dot"),
    )
    add_numbers(parser, "mada_lab.theory.scale_figure:Setting", numbers)
    add_figure(parser, "scale")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.tasks.stored import prepare_file
    from mada_lab.theory.scale_figure import Setting, draw_scale, rates_and_losses, summarize

    written = figure_files(arguments.out)
    with values_from_the_user():
        setting = Setting(**chosen(arguments, Setting))
    for path in written:
        prepare_file(path)
    print(summarize(setting))
    draw_scale(setting, Path(arguments.out))
    print(f"Written: {', '.join(map(str, written))}")
    rows = [{"name": name, "rate": rate, "loss": loss} for name, rate, loss in rates_and_losses(setting)]
    return 0, {"figures": written, "rules": rows}
