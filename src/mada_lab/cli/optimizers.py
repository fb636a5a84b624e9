"""``mada optimizers``: the optimizers that experiments know by name."""

from __future__ import annotations

import argparse

from mada_lab.cli.options import Outcome

SUMMARY = "list the optimizers"
EPILOG = """\
examples:
  mada optimizers
  mada optimizers --json
"""
NEEDS = ()


def add_options(_: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""


def run(_: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from mada_lab.optimizers.registry import ENTRIES

    rows = [("name", "lr", "")] + [(name, f"{entry.lr:g}", entry.description) for name, entry in ENTRIES.items()]
    names, lrs, _descriptions = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, lr, description in rows:
        print(f"{name:<{names}}  {lr:<{lrs}}  {description}".rstrip())
    return 0, [{"name": name, "lr": entry.lr, "description": entry.description} for name, entry in ENTRIES.items()]
