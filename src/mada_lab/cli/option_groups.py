"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mada_lab.cli.options import Pair, chosen

if TYPE_CHECKING:
    from mada_lab.run.config import RunConfig

DRAWING = ("matplotlib", "numpy", "rich")
"""Packages that a command needs to draw figures."""
TRAINING = (*DRAWING, "filelock", "tensorboard", "transformers")
"""Packages that a command needs to train."""

# Where defaults are declared.
_RUN = "mada_lab.run.config:RunConfig"
_WINDOWS, _TOKENS = "mada_lab.tasks.windows:WindowsConfig", "mada_lab.tasks.tokens:TokensConfig"
_VISION = "mada_lab.tasks.vision:VisionConfig"
_GPT = {"": _WINDOWS, "tokens: ": _TOKENS}
_ALL = {**_GPT, "vision: ": _VISION}
_BETAS, _WEIGHT_DECAY = "mada_lab.optimizers.build:BETAS", "mada_lab.optimizers.registry:WEIGHT_DECAY"


def run_config(arguments: argparse.Namespace, **optimizer: Any) -> RunConfig:
    """Return the configuration that the options describe.

    An option belongs to the field of its name in ``RunConfig``, ``OptimizerConfig`` or the configuration of a task.
    What was not given keeps the default of the field.

    Args:
        arguments: of the command line.
        optimizer: further arguments of ``OptimizerConfig``.
    """
    from mada_lab.run.config import TASKS, OptimizerConfig, RunConfig, make_task

    values = {"kind": arguments.task} if "task" in arguments else {}
    for task in TASKS.values():
        values |= chosen(arguments, task)
    fields = chosen(arguments, RunConfig)
    fields["task"] = make_task(values)
    fields["optimizer"] = OptimizerConfig(**chosen(arguments, OptimizerConfig), **optimizer)
    return RunConfig(**fields)


def add_data_and_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the task."""
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--task",
        metavar="KIND",
        help="language (characters), tokens or vision (default: %(mada_lab.tasks.language:LanguageConfig.kind)s)",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help="any UTF-8 text (default: Python's language reference); tokens: a folder that 'mada tokens' made; "
        "vision: a folder with CIFAR-10's parquet files (default: scikit-learn's digits)",
    )
    for name, meaning, configs in (
        ("layers", "layers", _GPT),
        ("heads", "attention heads", _GPT),
        ("width", "width, a multiple of heads; vision: channels of the first layer", _ALL),
        ("context", "characters or tokens that the model sees", _GPT),
        ("batch", "windows or images in a batch", _ALL),
        ("val_windows", "windows to validate on", {"": _WINDOWS}),
    ):
        default = "; ".join(f"{task}%({config}.{name})s" for task, config in configs.items())
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=int, metavar="N", help=f"{meaning} (default: {default})")
    group.add_argument(
        "--dropout",
        type=float,
        metavar="X",
        help=f"language, tokens: share left out (default: %({_WINDOWS}.dropout)s)",
    )
    group.add_argument("--size", metavar="NAME", help="tokens: gpt2, gpt2-medium, ..., for layers, heads and width")
    group.add_argument(
        "--init",
        metavar="RUN",
        help="begin with the weights of an earlier run; tokens: also with published ones, in a folder or on the hub",
    )
    group.add_argument(
        "--characters-of", metavar="FILE", help="language: know the characters of this text, too, for a later run on it"
    )
    group.add_argument("--wikitext", metavar="FOLDER", help="tokens: measure the perplexity on its val.bin, too")
    group.add_argument("--lambada", metavar="FILE", help="tokens: measure last words, too; text or JSON lines")
    group.add_argument("--model", metavar="NAME", help=f"vision: cnn or resnet9 (default: %({_VISION}.model)s)")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="vision: shift and mirror (default: all but the digits)",
    )
    group.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="language, tokens: products in bfloat16 (default: no; tokens: where there is a GPU)",
    )


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
        "--workers", type=int, metavar="N", default=1, help="runs at the same time (default: %(default)s)"
    )
    group.add_argument("--address", metavar="A", default=None, help="of a Ray cluster (default: this machine alone)")


def add_reference(group: argparse._ActionsContainer) -> None:
    """Add the optimizer that tables compare with."""
    group.add_argument(
        "--reference",
        metavar="NAME",
        help="optimizer that the tables compare the others with (default: %(mada_lab.report.tables:REFERENCE)s)",
    )
