"""A run as it is stored: where it was trained, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from mada_lab.files import read_json
from mada_lab.run.folder import Metrics, RunFolder
from mada_lab.run.result import Result, summarize


@dataclass(frozen=True)
class StoredRun:
    """A run that is over. ``betas`` is where they started; None: where the optimizer has them start.

    ``name`` is that of its folder.
    """

    lr: float
    betas: tuple[float, float] | None
    seed: int
    result: Result
    metrics: Metrics
    name: str = ""


def load_run(folder: RunFolder, under_way: bool = False) -> StoredRun | None:
    """Read a run from its folder. None where it is not over, or, where it may be ``under_way``, has not begun."""
    if not folder.result_file.exists() and not under_way:
        return None
    config, metrics = folder.config(), folder.metrics()
    if folder.result_file.exists():
        result = Result(**read_json(folder.result_file))
    elif metrics:
        result = summarize(metrics, "interrupted", {}, 0)
    else:
        return None
    return StoredRun(config.optimizer.lr, config.optimizer.betas, config.seed, result, metrics, folder.path.name)
