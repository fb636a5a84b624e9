"""The folder of a run: what is in it, how it survives a kill at any moment, how it is read again.

config.json       resolved configuration, data, versions, machine; written before the first step
metrics.jsonl     one line for each step and for each validation
checkpoint.pt     model, optimizer, step
tensorboard/      events
figure.png, .svg  losses and coefficients
result.json       written last: the run is over
lock              held by the process that trains
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mada_optim
from mada_lab.errors import InputError
from mada_lab.files import (
    CHECKPOINT,
    CONFIG,
    LOCK,
    RESULT,
    TEMPORARY,
    read_checkpoint,
    read_json,
    replacing,
    write_json,
)
from mada_lab.run.config import ResolvedRun, differences, resolved_from_dict, to_dict

Metrics = list[dict[str, Any]]
_TAIL = 4096  # bytes, more than a line has


class RunFolder:
    """Paths, reading and writing. Files appear whole or not at all, except metrics.jsonl, which grows by lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / CONFIG
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoint_file = self.path / CHECKPOINT
        self.result_file = self.path / RESULT
        self.tensorboard = self.path / "tensorboard"

    def check_free(self) -> None:
        """Raise unless a run can start here."""
        if self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise InputError(
                f"out must be a new or empty folder, got {str(self.path)!r}; to go on with a run: --resume"
            )

    def create(self, config: ResolvedRun, data: Mapping[str, Any]) -> None:
        """Start a run, in a folder that is locked. ``data`` is the task's description."""
        self.check_free()
        write_json(
            self.config_file,
            {"config": to_dict(config), "data": dict(data), "versions": _versions(), "machine": _machine()},
        )

    def _is_empty(self) -> bool:
        """Return whether nothing is there, or only what a kill in this very moment left behind."""
        return all(path.suffix == TEMPORARY or path.name == LOCK for path in self.path.iterdir())

    def config(self) -> ResolvedRun:
        """Read the run. Raise :class:`InputError` where there is none."""
        if not self.config_file.exists():
            raise InputError(f"resume must be the folder of a run, got {str(self.path)!r}, which has no config.json")
        return resolved_from_dict(read_json(self.config_file)["config"])

    def recorded(self) -> dict[str, Any]:
        """Return what config.json says beside the configuration: data, versions, machine."""
        return {name: value for name, value in read_json(self.config_file).items() if name != "config"}

    def check_same(self, config: ResolvedRun, data: Mapping[str, Any]) -> None:
        """Raise unless this folder is of the same configuration on the same data."""
        differing = differences(to_dict(config), to_dict(self.config()))
        differing += differences(data, self.recorded()["data"])
        if differing:
            raise InputError(
                f"{self.path} is a run of another configuration ({'; '.join(differing)}); choose a new folder"
            )

    # Metrics.

    def metrics(self) -> Metrics:
        """Return all whole lines. What a kill in the middle of a write left behind is not a line."""
        if not self.metrics_file.exists():
            return []
        lines: Metrics = []
        for line in self.metrics_file.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def last_step(self) -> int:
        """Return the step of the last whole line of the metrics, 0 where there is none. Reads only the end."""
        if not self.metrics_file.exists():
            return 0
        with self.metrics_file.open("rb") as file:
            file.seek(max(0, self.metrics_file.stat().st_size - _TAIL))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is being written
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
        return 0

    def truncate_metrics(self, step: int) -> None:
        """Forget what came after a checkpoint; it will come again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if sum("loss" in line for line in kept) != step:
            raise InputError(f"{self.metrics_file} lacks lines before step {step}, where the checkpoint was written")
        with replacing(self.metrics_file) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    # Checkpoint.

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint. Raises OSError where it cannot be written; the last one is then still there."""
        with replacing(self.checkpoint_file) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # Closing its archive, torch hides what went wrong while writing it.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state that was saved last, on the CPU; None where the run ended before its first checkpoint."""
        if not self.checkpoint_file.exists():
            return None
        try:
            return read_checkpoint(self.checkpoint_file)
        except ValueError as error:
            raise InputError(
                f"{self.checkpoint_file} cannot be read ({error}); delete it to start this run again from step 0"
            ) from error


def _versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mada_optim": mada_optim.__version__,
    }


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}
