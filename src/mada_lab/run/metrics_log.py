"""Where the metrics of a run are written while it is trained."""

from __future__ import annotations

import json
import os
from typing import Any

from mada_lab.run.folder import RunFolder


class MetricsLog:
    """metrics.jsonl and tensorboard's events, to which lines are added, that of ``begin`` being the first to come.

    Other processes than the first write none.
    """

    def __init__(self, folder: RunFolder, begin: int, first: bool) -> None:
        self.folder, self.begin, self.first = folder, begin, first

    def __enter__(self) -> MetricsLog:
        if self.first:
            # Slow to import, and not needed before something is trained.
            from torch.utils.tensorboard import SummaryWriter

            self._file = self.folder.metrics_file.open("a", encoding="utf-8")
            # What an earlier process logged of these steps does not count.
            self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=self.begin)
        return self

    def __exit__(self, *_: object) -> None:
        if self.first:
            self._board.close()
            self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        if self.first:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            _log(self._board, line)

    def flush(self, to_disk: bool = False) -> None:
        if self.first:
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())


def _log(board: Any, line: dict[str, Any]) -> None:
    step = line["step"]
    for name, value in {**line, **line.get("coefficients", {})}.items():
        if name in ("step", "coefficients", "skipped") or value is None:
            continue
        group = "coefficients/" if name in line.get("coefficients", {}) else "time/" if "seconds" in name else ""
        board.add_scalar(group + name, value, step)
