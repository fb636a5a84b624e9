"""``mada online``: Adam, AMSGrad, AVGrad and MADA on the online problem on which Adam goes wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from mada_lab.cli.option_groups import DRAWING
from mada_lab.cli.options import Outcome, Pair, chosen
from mada_lab.cli.theory import add_figure, add_numbers, figure_files, values_from_the_user

SUMMARY = "play the online problem on which Adam goes wrong"
EPILOG = """\
examples:
  mada online
  mada online --problem stochastic --seeds 8 --out stochastic

problems:
  theorem      3 x at each third step, -x at the others (Theorem 1 of Reddi et al.)
  periodic     1010 x at each 101st step, -10 x at the others (their experiments)
  stochastic   1010 x with probability 0.01, else -10 x
each on [-1, 1], with the best point at -1. docs/online.md says what is seen.
"""
NEEDS = DRAWING

_SETTING = "mada_lab.theory.online:Setting"


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    problem = f"theorem, periodic or stochastic (default: %({_SETTING}.problem)s)"
    parser.add_argument("--problem", metavar="NAME", help=problem)
    parser.add_argument(
        "--betas",
        type=float,
        nargs=2,
        action=Pair,
        metavar=("B1", "B2"),
        help="of all optimizers (default: 0.95 0.99; theorem: 0 0.1)",
    )
    numbers = (
        ("alpha", float, "the learning rate is alpha/√t"),
        ("steps", int, ""),
        ("hyper_lr", float, "step size of rho"),
        ("seeds", int, "runs of the stochastic problem"),
    )
    add_numbers(parser, _SETTING, numbers)
    parser.add_argument(
        "--scan",
        action="store_true",
        help="instead of a figure, tables in Markdown over betas, step sizes of rho, and values at which it is held",
    )
    parser.add_argument(
        "--projected",
        action="store_true",
        help="hypergradients of what is paid: 0 after a step that the projection onto [-1, 1] cut",
    )
    add_figure(parser, "online")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from rich.console import Console

    from mada_lab.display.progress import StepsDisplay
    from mada_lab.tasks.stored import prepare_file
    from mada_lab.theory.online import Setting, draw_online, finals, scan, steps_of, summarize

    written = figure_files(arguments.out)
    scanned = hasattr(arguments, "scan")
    with values_from_the_user():
        setting = Setting(**chosen(arguments, Setting))
        for path in written if not scanned else []:
            prepare_file(path)
        with StepsDisplay(Console(stderr=True), steps_of(setting, scanned)) as on_step:
            if scanned:
                lines = []
                for line in scan(setting, on_step):
                    print(line, flush=True)
                    lines.append(line)
                return 0, {"markdown": lines}
            played = {}
            for name, line, traces in summarize(setting, on_step):
                print(line, flush=True)
                played[name] = traces
    draw_online(setting, {name: traces for name, traces in played.items() if name}, Path(arguments.out))
    print(f"Written: {', '.join(map(str, written))}")
    return 0, {"figures": written, "optimizers": {name: finals(traces) for name, traces in played.items() if name}}
