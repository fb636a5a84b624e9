"""``mada bounds``: the convergence bound over ρ, beside what is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from mada_lab.cli.option_groups import DRAWING
from mada_lab.cli.options import Outcome, chosen
from mada_lab.cli.theory import add_figure, add_numbers, figure_files, values_from_the_user

SUMMARY = "draw the convergence bound over rho, beside what is measured"
EPILOG = """\
examples:
  mada bounds --beta2 0.99 --steps 100000
  mada bounds --dimension 100 --out bounds-100
"""
NEEDS = DRAWING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    numbers = (
        ("beta2", float, "β2 in (0, 1)"),
        ("steps", int, "T"),
        ("alpha", float, "α; the last learning rate is α/√T"),
        ("decay", float, "q in [0, 0.5]: learning rates fall as t^-q"),
        ("eps", float, "ε"),
        ("dimension", int, "d"),
        ("smoothness", float, "L"),
        ("gradient_bound", float, "R, gradients being at most R - ε"),
        ("gap", float, "F(x_1) - F*"),
        ("seeds", int, "runs for each setting that is measured"),
    )
    add_numbers(parser, "mada_lab.theory.figures:Setting", numbers)
    add_figure(parser, "bounds")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from rich.console import Console

    from mada_lab.tasks.stored import prepare_file
    from mada_lab.theory.figures import Setting, bounds, draw_bounds, summarize

    written = figure_files(arguments.out)
    with values_from_the_user():
        setting = Setting(**chosen(arguments, Setting))
        summary = summarize(setting)
        for path in written:
            prepare_file(path)
        print(summary)
        with Console(stderr=True).status("Measuring for the figure."):
            draw_bounds(setting, Path(arguments.out))
    print(f"Written: {', '.join(map(str, written))}")
    rows = [{"name": name, "rho": rho, "bound": bound} for name, rho, bound in bounds(setting)]
    return 0, {"figures": written, "bounds": rows}
