"""What a stage finds out: rows that are printed and written as they come, and the table made from them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS, SUMMARY = "results.jsonl", "summary.md"


class Record:
    """Appends the rows of one stage to a file.

    Args:
        folder: where the file is.
        stage: name of the stage.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._file, self._stage = folder / RESULTS, stage
        self._began = time.perf_counter()

    def row(self, what: str, **values: Any) -> None:
        """Print and write a row. ``values`` are JSON values, by the title of their column."""
        at = round(time.perf_counter() - self._began, 1)
        line = {"stage": self._stage, "what": what, **values, "at": at}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        cells = "  ".join(f"{title} {_text(value)}" for title, value in values.items())
        print(f"  {at:6.1f} s  {what:<40} {cells}", flush=True)

    def bar(self, what: str, value: float, bar: float) -> None:
        """Write a value that is to be at most ``bar``."""
        self.row(what, value=value, bar=bar, met=value <= bar)

    @contextmanager
    def check(self, what: str) -> Iterator[dict[str, Any]]:
        """Write whether the body raised. It may put further values of the row into the dict."""
        values: dict[str, Any] = {}
        try:
            yield values
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.row(what, holds=False, **values, reason=reason)
        else:
            self.row(what, holds=True, **values)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all rows that have been written. A last line that was cut off is left out."""
    rows = []
    path = folder / RESULTS
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return the checks that do not hold and the stages that did not end."""
    failed = [row for row in rows if row.get("holds") is False or row.get("ended") not in (None, "done")]
    return [f"{row['stage']}: {row['what']}" for row in failed]


def write_summary(folder: Path) -> list[dict[str, Any]]:
    """Write the rows as Markdown: what failed, the bars, then a table for each stage. Return the rows."""
    rows = read(folder)
    failed = failures(rows)
    parts = [f"# Results\n\nFailed: {'; '.join(failed) or 'nothing'}.\n"]
    bars = [row for row in rows if "bar" in row]
    if bars:
        parts.append("## Bars\n\n" + _table(bars, ["stage", "what", "value", "bar", "met"]))
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage and "bar" not in row]
        titles = list(dict.fromkeys(title for row in own for title in row if title != "stage"))
        if own:
            parts.append(f"## {stage}\n\n" + _table(own, titles))
    (folder / SUMMARY).write_text("\n".join(parts), "utf-8")
    return rows


def _table(rows: list[dict[str, Any]], titles: list[str]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [[_text(row[title]) if title in row else "" for title in titles] for row in rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
