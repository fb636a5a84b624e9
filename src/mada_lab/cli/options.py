"""How the command ``mada`` reads options and prints their help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from mada_lab.cli.defaults import as_text, declared

Outcome = tuple[int, Any]
"""The exit code of a command, and its results for ``--json``."""
_REFERENCE = re.compile(r"%\(([\w.]+:[\w.]+)\)s")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, which puts defaults into help texts: ``%(mada_lab.run.config:RunConfig.steps)s`` becomes 1000.

    ``%(default)s`` is the default of the option itself, as argparse has it.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text and _REFERENCE.sub(lambda match: as_text(declared(match[1])), text)


class CommandParser(argparse.ArgumentParser):
    """argparse's, with a suggestion for what was mistyped, under the usage of the command that it was given to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See :meth:`argparse.ArgumentParser.parse_known_args`; here nothing may be left over.

        argparse hands what a command does not know back to the parser of ``mada``, whose usage says nothing of it.
        """
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = [self._hint(argument) for argument in unknown if argument.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit."""
        # A mistyped command, of which argparse itself says only which ones there are.
        wrong = message.partition("invalid choice: ")[2].split(" ")[0].strip("'")
        if wrong and "COMMAND" in message:
            (commands,) = (action for action in self._actions if action.metavar == "COMMAND")
            message += _did_you_mean(wrong, list(commands.choices or ()))
        super().error(message)

    def _hint(self, argument: str) -> str:
        return _did_you_mean(argument.partition("=")[0], list(self._option_string_actions))


class Pair(argparse.Action):
    """Two values as a tuple."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:  # noqa: ARG002
        setattr(namespace, self.dest, tuple(values))


class Version(argparse.Action):
    """argparse's own needs the version, and with it torch, before anyone asks for it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import mada_optim

        print(f"mada {mada_optim.__version__}")
        parser.exit()


def chosen(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Return the options that are fields of the dataclass ``kind``. An option that was not given is left out.

    >>> from mada_lab.theory.online import Setting
    >>> chosen(argparse.Namespace(alpha=0.5, out="figure"), Setting)
    {'alpha': 0.5}
    """
    values, names = vars(arguments), (item.name for item in dataclasses.fields(kind))
    return {name: values[name] for name in names if name in values}


def new_folder(name: str) -> Path:
    """Return the folder ``runs/TIME-name``."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def to_json(results: Any) -> str:
    """Return results as a JSON document. JSON has no NaN and no infinity: they become null.

    >>> from pathlib import Path
    >>> print(to_json({"loss": float("nan"), "file": Path("a")}))
    {
      "loss": null,
      "file": "a"
    }
    """
    return json.dumps(_portable(results), indent=2, ensure_ascii=False, default=str)


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _portable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_of(kind: Any) -> Callable[[str], list[Any]]:
    """Return a function that makes a list of ``kind`` of a text with commas."""

    def convert(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",") if item]

    convert.__name__ = f"comma-separated {kind.__name__}"
    return convert


def split_labels(texts: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the labels of texts. Each is a label that is known, which may have commas in it, or labels with commas.

    >>> split_labels(["omada, rows", "adamw,mada"], ["omada, rows", "adamw", "mada"])
    ['omada, rows', 'adamw', 'mada']
    """
    return [label for text in texts for label in ([text] if text in known else list_of(str)(text))]


def seeds(text: str) -> list[int]:
    """Return the seeds of ``3``, a number of them, or of ``0,1,5``, a list."""
    values: list[int] = list_of(int)(text)
    return list(range(values[0])) if len(values) == 1 and "," not in text else values


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """
    >>> _did_you_mean("--optimzer", ["--optimizer", "--out"]), _did_you_mean("--zzz", ["--out"])
    ('; did you mean --optimizer?', '')
    """
    close = get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
