"""What ``mada bounds``, ``mada online`` and ``mada scale`` share: numbers of a setting, and a figure of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def add_numbers(
    parser: argparse.ArgumentParser, setting: str, numbers: Sequence[tuple[str, type[int] | type[float], str]]
) -> None:
    """Add options for fields of a setting.

    Args:
        parser: of the command.
        setting: the dataclass, as ``module:Class``.
        numbers: of each field, its name, its type and its meaning.
    """
    for name, kind, meaning in numbers:
        flag, metavar = f"--{name.replace('_', '-')}", "X" if kind is float else "N"
        text = f"{meaning} (default: %({setting}.{name})s)".strip()
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)


def add_figure(parser: argparse.ArgumentParser, default: str) -> None:
    """Add where the figure is written."""
    parser.add_argument("--out", metavar="FILE", default=default, help="figure, without suffix (default: %(default)s)")


def figure_files(out: str) -> list[Path]:
    """Return the files of a figure."""
    return [Path(out).with_suffix(suffix) for suffix in (".png", ".svg")]


@contextmanager
def values_from_the_user() -> Iterator[None]:
    """Turn a ValueError into an InputError: the values that are checked inside are the user's."""
    from mada_lab.tasks import InputError

    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None
