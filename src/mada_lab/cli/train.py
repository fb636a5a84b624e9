"""``mada train``: one training, or the rest of one that was interrupted."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mada_lab.cli.option_groups import (
    TRAINING,
    add_common_optimizer,
    add_data_and_model,
    add_seed,
    add_training,
    run_config,
)
from mada_lab.cli.options import Outcome, new_folder

if TYPE_CHECKING:
    from mada_lab.run.config import RunConfig

SUMMARY = "train a GPT on a text"
EPILOG = """\
examples:
  mada train --lr 1e-2 --steps 600
  mada train --rho 0 --hyper-lr rho=0.1 c=0.1     start at AVGrad, learn only rho and c
  mada train --optimizer hyperadam --betas 0.3 0.6
  mada train --data FILE --init runs/NAME         fine-tuning: begin with the weights of an earlier run
  torchrun --nproc-per-node 2 -m mada_lab train    several processes share each batch
"""
NEEDS = TRAINING

# Coefficients with an option each, and MADA's start of them.
_STARTS = {"beta3": "0", "rho": "1", "c": "1", "gamma": "1"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    add_data_and_model(parser)
    group = parser.add_argument_group("optimizer")
    name = "%(mada_lab.optimizers.config:OptimizerConfig.name)s"
    group.add_argument("--optimizer", metavar="NAME", help=f"see 'mada optimizers' (default: {name})")
    lr = "%(mada_lab.optimizers.registry:LR)s; lion: 1e-3, prodigy: 1, dadaptation: 1, dog: 1, mechanic: 1"
    group.add_argument("--lr", type=float, help=f"peak learning rate (default: {lr})")
    add_common_optimizer(group)
    for coefficient, start in _STARTS.items():
        group.add_argument(f"--{coefficient}", type=float, help=f"where {coefficient} starts (default: {start})")
    group.add_argument(
        "--hyper-lr",
        nargs="+",
        metavar="X",
        help="step size of the coefficients: a number, or NAME=NUMBER pairs, what is not named being frozen "
        "(default: 5e-4 for beta1, 0 for beta2, 0.1 for the others)",
    )
    group = add_training(parser)
    add_seed(group)
    group.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's choice)")
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", metavar="DIR", help="a new folder (default: runs/TIME-OPTIMIZER)")
    group.add_argument(
        "--resume", metavar="RUN", default=None, help="go on from the checkpoint in this folder; no other options"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from rich.console import Console

    from mada_lab.display.progress import Display
    from mada_lab.errors import InputError
    from mada_lab.files import read_json
    from mada_lab.run.folder import RunFolder
    from mada_lab.run.train import train

    resume = arguments.resume is not None
    if resume:
        others = [name for name in vars(arguments) if name not in ("resume", "quiet")]
        if others:
            flags = ", ".join("--" + name.replace("_", "-") for name in others)
            raise InputError(f"--resume takes everything from the run's config.json; leave out {flags}")
        folder = RunFolder(arguments.resume)
        config: RunConfig = folder.config()
    else:
        config = config_of(arguments)
        folder = RunFolder(getattr(arguments, "out", new_folder(config.optimizer.name)))
    # One of the processes that torchrun started is enough to say it.
    quiet = getattr(arguments, "quiet", False) or os.environ.get("RANK", "0") != "0"
    console = Console(quiet=quiet)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if resume and folder.result_file.exists():
        stored = read_json(folder.result_file)
        say(f"{folder.path} is {stored['status']}; nothing to do.")
        return 0, {"folder": folder.path, **stored}
    with Display(console, config.steps, quiet) as display:
        result = train(config, folder.path, resume=resume, on_begin=display.begin, on_step=display)
    results = {"folder": folder.path, **dataclasses.asdict(result)}
    if result.status == "interrupted":
        say(f"Interrupted after step {result.step}. Go on with: mada train --resume {folder.path}")
        return 130, results
    if result.status == "diverged":
        print(
            f"mada: the run diverged: no finite loss or gradient in the last steps up to step {result.step}. "
            f"Try a lower --lr than {folder.config().optimizer.lr:g}.",
            file=sys.stderr,
        )
        return 1, results
    say(
        f"Validation loss {result.val_loss:.4f} (best {result.best_val_loss:.4f}). Figure: {folder.path / 'figure.png'}"
    )
    return 0, results


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration that the options describe, with what they say of the optimizer."""
    values = vars(arguments)
    name = {"name": values["optimizer"]} if "optimizer" in values else {}
    options = {coefficient: values[coefficient] for coefficient in _STARTS if coefficient in values}
    if "hyper_lr" in values:
        options["hyper_lr"] = _hyper_lr(values["hyper_lr"])
    return run_config(arguments, **name, options=options)


def _hyper_lr(words: Sequence[str]) -> float | dict[str, float]:
    from mada_lab.errors import InputError

    try:
        if len(words) == 1 and "=" not in words[0]:
            return float(words[0])
        pairs = [word.split("=") for word in words]
        step_sizes = {name: float(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"hyper_lr must be a number or name=number pairs, got {' '.join(words)!r}") from None
    if len(step_sizes) < len(pairs):
        raise InputError(f"hyper_lr must name each coefficient once, got {' '.join(words)!r}")
    return step_sizes
