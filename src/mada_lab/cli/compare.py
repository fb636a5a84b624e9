"""``mada compare``: several optimizers on equal terms, over a grid of learning rates and seeds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mada_lab.cli.option_groups import (
    TRAINING,
    add_common_optimizer,
    add_data_and_model,
    add_reference,
    add_training,
    add_workers,
    run_config,
)
from mada_lab.cli.options import Outcome, list_of, new_folder, seeds
from mada_lab.cli.stages import print_report, train_stages

if TYPE_CHECKING:
    from mada_lab.sweep.experiment import Experiment

SUMMARY = "train several optimizers on equal terms"
EPILOG = """\
examples:
  mada compare --optimizers adamw,avgrad,hyperadam,mada --lrs 3e-4,1e-3,3e-3,1e-2 --seeds 3 --out runs/grid
  mada compare --optimizers adamw,mada,mada:rho=0  an optimizer with options: name:option=value:...
  mada compare --report runs/grid                 tables and figure again, from stored metrics

A comparison that was interrupted goes on with the same command. More optimizers, learning rates and seeds may be
added to the same folder; finished runs are kept.
"""
NEEDS = TRAINING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    # argparse reads a default that is a text as if the user had typed it.
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--optimizers",
        type=list_of(str),
        metavar="A,B,...",
        default="adamw,avgrad,hyperadam,mada",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--lrs",
        type=list_of(float),
        metavar="X,Y,...",
        default="3e-4,1e-3,3e-3,1e-2",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--seeds", type=seeds, metavar="N", default="3", help="how many, or a list: 0,1,5 (default: %(default)s)"
    )
    add_data_and_model(parser)
    add_common_optimizer(parser.add_argument_group("optimizers"))
    group = add_training(parser, steps=600, eval_every=30)
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=1,
        help="of torch in each worker; times are most honest with 1 (default: %(default)s)",
    )
    add_workers(group)
    group = parser.add_argument_group("folder")
    group.add_argument("--out", metavar="DIR", help="new, or of this comparison (default: runs/TIME-compare)")
    group.add_argument("--report", metavar="DIR", help="train nothing; tables and figure from what is stored in DIR")
    add_reference(group)


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.sweep.compare import comparison
    from mada_lab.sweep.stage_folder import TUNE, check_reference

    out = Path(getattr(arguments, "report", None) or getattr(arguments, "out", None) or new_folder("compare"))
    reference = getattr(arguments, "reference", None)
    code = 0
    if not hasattr(arguments, "report"):
        if reference is not None:
            check_reference(reference, arguments.optimizers)
        experiment = comparison(arguments.optimizers, arguments.lrs, arguments.seeds, run_config(arguments))
        _name_those_without_betas(experiment)
        code = train_stages(experiment, {TUNE: out}, out, arguments)
    return code, {"folder": out, **(print_report(out, reference) if code != 130 else {})}


def _name_those_without_betas(experiment: Experiment) -> None:
    common = experiment.base.optimizer.betas
    without = [label for label in experiment.contenders if experiment.config(label).optimizer.betas is None]
    if common is not None and without:
        example = f"{experiment.contenders[without[0]].name}:beta1=NUMBER:beta2=NUMBER"
        print(
            f"mada: --betas do not reach {', '.join(without)}, for which they mean something else; give {example}",
            file=sys.stderr,
        )
