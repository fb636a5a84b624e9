"""``mada tokens``: texts, packed as GPT-2's tokens."""

from __future__ import annotations

import argparse

from mada_lab.cli.options import Outcome

SUMMARY = "pack texts as GPT-2's tokens"
EPILOG = """\
examples:
  mada tokens --data novels.txt.gz --val-data held_out.txt.gz --tokenizer gpt2 --out data/novels
  mada tokens --data Skylion007/openwebtext --val-share 0.0005 --out data/openwebtext
  mada tokens --data Salesforce/wikitext:wikitext-103-raw-v1:test --join --val-share 1 --out data/wikitext

The folder appears when it is whole. After an interruption, begin again with the same command.
"""
NEEDS = ("filelock", "numpy", "rich", "tokenizers")

_PACK = "mada_lab.tasks.packing:pack"


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        required=True,
        help="text files (.txt, .txt.gz), files with a column text (.parquet, .arrow, .jsonl, .json), a folder of "
        "either, or NAME[:CONFIG[:SPLIT]] on the hub",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new folder")
    tokenizer = f"on the hub, or a folder with its files (default: %({_PACK}.tokenizer)s)"
    parser.add_argument("--tokenizer", metavar="NAME", help=tokenizer)
    share = f"the end of a text, or rows at random (default: %({_PACK}.val_share)s)"
    parser.add_argument("--val-share", type=float, metavar="X", help=share)
    parser.add_argument("--val-data", nargs="+", metavar="SOURCE", help="validation data of their own")
    parser.add_argument("--join", action="store_true", help="rows are lines of one text")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from mada_lab.tasks.corpus import Corpus
    from mada_lab.tasks.packing import Part, pack

    values = vars(arguments)
    join = values.get("join", False)
    val = Corpus(tuple(values["val_data"]), join) if "val_data" in values else None
    options = {name: values[name] for name in ("tokenizer", "val_share") if name in values}
    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task("")

        def on_batch(*parts: Part) -> None:
            tokens, seconds = sum(part.tokens for part in parts), progress.tasks[0].elapsed
            speed = tokens / seconds if seconds else 0.0
            progress.update(shown, description=f"{tokens:,} tokens, {speed:,.0f} a second")

        meta = pack(Corpus(tuple(arguments.data), join), arguments.out, val=val, on_batch=on_batch, **options)
    train, validation = (meta[part]["tokens"] for part in ("train", "val"))
    console.print(f"Written: {arguments.out}, {train:,} tokens to train on, {validation:,} to validate on.")
    return 0, {"folder": arguments.out, **meta}
