# PYTHON_ARGCOMPLETE_OK
"""The command ``mada``: its parser, which command runs, the exit code, and ``--json``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from mada_lab.cli.options import CommandParser, Outcome, Version, to_json

COMMANDS = (
    "demo",
    "train",
    "compare",
    "tokens",
    "sweep",
    "report",
    "pack",
    "bench",
    "optimizers",
    "bounds",
    "online",
    "scale",
)
"""A file of this folder for each, in the order of ``mada --help``."""

_DESCRIPTION = "Train with an optimizer that tunes itself, and compare it with others on equal terms."
_FIRST_STEPS = """\
mada trains with an optimizer that tunes itself. Where to start:
  mada demo              AdamW and OMADA from the same bad guess
  mada train             train a small GPT and watch the coefficients move
  mada compare           compare optimizers over learning rates and seeds
  mada COMMAND --help    options and an example of a command; mada --help lists all commands"""
_EPILOG = """\
examples:
  mada demo                                       AdamW and OMADA side by side, from a badly guessed learning rate
  mada train                                      a small GPT on Python's own documentation, with MADA
  mada train --data FILE --optimizer adamw        another text, another optimizer
  mada train --resume runs/NAME                   go on after an interruption
  mada compare --optimizers adamw,mada --seeds 3  side by side, over a grid of learning rates
  mada tokens --data FILE --out FOLDER            a text in GPT-2's tokens, for mada train --task tokens
  mada sweep experiments/shakespeare.toml --data-root DIR   an experiment, with its grid, from a file
  mada report runs/NAME                           tables and interactive figures of what is stored, as an HTML file
  mada bounds --beta2 0.99 --steps 100000         what theory says of Adam, AVGrad and what lies between
  mada scale                                      what a learned scale finds on a noisy quadratic
  mada online --betas 0.95 0.99                   the online problem on which Adam goes wrong
"""


class Command(Protocol):
    """What the file of a command has."""

    SUMMARY: str
    """A line for ``mada --help``."""
    EPILOG: str
    """The end of the command's own help: examples, each of which can be run, and notes."""
    NEEDS: Sequence[str]
    """Packages besides torch. They are looked for first, so that no command fails after it has computed."""

    def add_options(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the options. An option without a ``default`` leaves no attribute where it is not given."""

    def run(self, arguments: argparse.Namespace, /) -> Outcome:
        """Do what the command is for. Whatever imports torch is imported here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return the exit code: 0, 1 (diverged), 2 (wrong input) or 130 (interrupted)."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ and find_spec("argcomplete") is not None:
        import argcomplete

        argcomplete.autocomplete(parser)
    if not (sys.argv[1:] if argv is None else argv):
        print(_FIRST_STEPS)
        return 0
    arguments = parser.parse_args(argv)
    command: Command = vars(arguments).pop("command")
    as_json = vars(arguments).pop("json", False)
    missing = [package for package in command.NEEDS if find_spec(package) is None]
    if missing:
        print(f"mada: {missing[0]} is missing: pip install 'mada-optim[lab]'", file=sys.stderr)
        return 2
    from mada_lab.errors import InputError

    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            code, results = command.run(arguments)
        if as_json:
            print(to_json(results))
        return int(code)
    except (InputError, OSError) as error:
        print(f"mada: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``mada``. Its result has the file of the command as ``command``."""
    parser = CommandParser("mada", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=Version, default=argparse.SUPPRESS, help="print the version and exit")
    choices = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = cast(Command, import_module(f"mada_lab.cli.{name}"))
        options = choices.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=command.EPILOG,
            argument_default=argparse.SUPPRESS,
        )
        options.add_argument(
            "--json", action="store_true", help="print results as one JSON document, the rest to stderr"
        )
        options.set_defaults(command=command)
        command.add_options(options)
    return parser
