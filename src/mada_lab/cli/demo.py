"""``mada demo``: AdamW and OMADA side by side, from a badly guessed learning rate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mada_lab.cli.option_groups import (
    TRAINING,
    add_common_optimizer,
    add_data_and_model,
    add_seed,
    add_training,
    run_config,
)
from mada_lab.cli.options import Outcome, new_folder

SUMMARY = "train with AdamW and with OMADA side by side, from a badly guessed learning rate"
EPILOG = """\
examples:
  mada demo                                       a small GPT on Python's own documentation; two minutes
  mada demo --lr 0.1                              a guess that is too high
  mada demo --data FILE --steps 1000              another text, longer
  mada demo --out runs/NAME                       with the folder of a demo that was interrupted: go on

Both trainings run at the same time, on one core each. Their run folders are under runs/ in the folder of the demo.
"""
NEEDS = TRAINING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    guess = "%(mada_lab.demo.experiment:GUESS)s, which is ten times too low for AdamW"
    parser.add_argument("--lr", type=float, help=f"the guess (default: {guess})")
    add_data_and_model(parser)
    add_common_optimizer(parser.add_argument_group("optimizers"))
    group = add_training(parser, steps=600, eval_every=50, checkpoint_every=100)
    add_seed(group)
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=1,
        help="of torch in each of the two processes (default: %(default)s)",
    )
    group = parser.add_argument_group("folder")
    group.add_argument("--out", metavar="DIR", help="new, or of this demo, which goes on (default: runs/TIME-demo)")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from rich.console import Console
    from rich.table import Table

    from mada_lab.demo import experiment as demo

    out = Path(getattr(arguments, "out", None) or new_folder("demo"))
    guess = vars(arguments).pop("lr", demo.GUESS)
    experiment = demo.demo(guess, run_config(arguments))
    console = Console(highlight=False, soft_wrap=True)
    console.print(demo.introduction(experiment), markup=False, soft_wrap=False)
    console.print(f"Folder: {out}. After an interruption, the same command with --out {out} goes on.\n", markup=False)
    ending = demo.train_side_by_side(experiment, out, console)
    for name, why in ending.failed.items():
        print(f"mada: {name} {why}", file=sys.stderr)
    if ending.interrupted:
        console.print(f"Interrupted. The same command with --out {out} goes on.", markup=False)
        return 130, {"folder": out}
    if ending.failed:
        return 1, {"folder": out}
    runs = demo.stored_runs(experiment, out)
    header, *rows = demo.table(experiment, runs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index > 1 else "left")
    for row in rows:
        table.add_row(*row)
    console.print("", table, "", sep="\n")
    sentence = demo.verdict(experiment, runs)
    console.print(sentence, markup=False, soft_wrap=False)
    demo.draw(experiment, runs, out)
    console.print("\nIn your code: from mada_optim import OMADA; optimizer = OMADA(model)", markup=False)
    console.print(f"Figure: {out / 'demo.png'}. All of it: mada report {out}", markup=False)
    return 0, {"folder": out, "table": [header, *rows], "summary": sentence}
