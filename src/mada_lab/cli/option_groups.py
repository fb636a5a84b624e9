"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mada_lab.cli.options import Pair, chosen
from mada_lab.tasks.registry import DEFAULT, KINDS, OPTIONS, TASKS, make_task, task_type

if TYPE_CHECKING:
    from mada_lab.run.config import RunConfig

DRAWING = ("matplotlib", "numpy", "rich")
"""Packages that a command needs to draw figures."""
TRAINING = (*DRAWING, "filelock", "tensorboard", "transformers")
"""Packages that a command needs to train."""

# Where defaults are declared.
_RUN = "mada_lab.run.config:RunConfig"
_BETAS, _WEIGHT_DECAY = "mada_lab.optimizers.build:BETAS", "mada_lab.optimizers.registry:WEIGHT_DECAY"


def run_config(arguments: argparse.Namespace, **optimizer: Any) -> RunConfig:
    """Return the configuration that the options describe.

    An option belongs to the field of its name in ``RunConfig``, ``OptimizerConfig`` or the configuration of a task.
    What was not given keeps the default of the field.

    Args:
        arguments: of the command line.
        optimizer: further arguments of ``OptimizerConfig``.
    """
    from mada_lab.optimizers.config import OptimizerConfig
    from mada_lab.run.config import RunConfig

    values = {"kind": arguments.task} if "task" in arguments else {}
    for kind in TASKS:
        values |= chosen(arguments, task_type(kind))
    fields = chosen(arguments, RunConfig)
    fields["task"] = make_task(values)
    fields["optimizer"] = OptimizerConfig(**chosen(arguments, OptimizerConfig), **optimizer)
    return RunConfig(**fields)


def add_data_and_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the task."""
    group = parser.add_argument_group("data and model")
    group.add_argument("--task", metavar="KIND", help=f"{KINDS} (default: {DEFAULT})")
    for name, option in OPTIONS.items():
        default = "; ".join(f"{task}%({config}.{name})s" for task, config in option.defaults.items())
        details: dict[str, Any] = {"help": f"{option.meaning} (default: {default})" if default else option.meaning}
        if option.kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        else:
            details |= {"type": option.kind, "metavar": option.metavar}
        group.add_argument(f"--{name.replace('_', '-')}", **details)


def add_common_optimizer(group: argparse._ArgumentGroup) -> None:
    """Add what every optimizer of a command gets."""
    group.add_argument(
        "--betas",
        type=float,
        nargs=2,
        action=Pair,
        metavar=("B1", "B2"),
        help=f"(start of) betas (default: %({_BETAS})s)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        metavar="X",
        help=f"decoupled, on tensors of 2 and more dimensions (default: %({_WEIGHT_DECAY})s)",
    )


def add_training(parser: argparse.ArgumentParser, **own_defaults: int) -> argparse._ArgumentGroup:
    """Add the options of a training. Return their group.

    Args:
        parser: of the command.
        own_defaults: the command's own defaults, in place of those of ``RunConfig``.
    """
    group = parser.add_argument_group("training")
    for name, kind, meaning in (
        ("steps", int, ""),
        ("warmup", float, "share of the steps in which lr rises; cosine follows"),
        ("clip", float, "maximal gradient norm, 0: none"),
        ("accumulate", int, "micro-batches of each process"),
        ("eval_every", int, "steps between validations"),
        ("checkpoint_every", int, "steps between checkpoints"),
    ):
        default = "%(default)s" if name in own_defaults else f"%({_RUN}.{name})s"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            default=own_defaults.get(name, argparse.SUPPRESS),
            help=f"{meaning} (default: {default})".strip(),
        )
    group.add_argument("--device", metavar="NAME", help="(default: cuda where there is one, else cpu)")
    group.add_argument("--dtype", metavar="NAME", help=f"float32, bfloat16 or float64 (default: %({_RUN}.dtype)s)")
    return group


def add_seed(group: argparse._ArgumentGroup) -> None:
    """Add the seed of a single training."""
    group.add_argument("--seed", type=int, help=f"of the initial weights and the data order (default: %({_RUN}.seed)s)")


def add_workers(group: argparse._ActionsContainer) -> None:
    """Add where the trainings of a grid run."""
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=1,
        help="runs at the same time; 0: one by one, without Ray (default: %(default)s)",
    )
    group.add_argument("--address", metavar="A", default=None, help="of a Ray cluster (default: this machine alone)")


def add_reference(group: argparse._ActionsContainer) -> None:
    """Add the optimizer that tables compare with."""
    group.add_argument(
        "--reference",
        metavar="NAME",
        help="optimizer that the tables compare the others with (default: %(mada_lab.report.results:REFERENCE)s)",
    )
