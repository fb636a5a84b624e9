"""A sweep as one small file: what its runs found, to keep in a repository, and to go on with on another machine.

A run that is over is worth its configuration, its result and its curves. Left out are checkpoints, events, most steps
between validations (the others are rounded to six digits) and paths of data, whose hashes say what they were. Unpacked,
the folder is one that ``mada report`` shows and that ``mada sweep`` adds to.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from mada_lab.errors import require
from mada_lab.files import prepare_file, read_json, replacing
from mada_lab.run.folder import Metrics, RunFolder
from mada_lab.sweep.stage_folder import STAGE
from mada_lab.tasks.registry import without_paths

STEPS = 50  # kept of each run, beside its validations
DIGITS = 6


def pack(folder: Path, out: Path) -> int:
    """Write the stages of ``folder`` to ``out``, a .tar.gz; how many runs are in it.

    Equal folders make equal files. Runs that are not over are left out.

    Raises:
        InputError: there is no stage in the folder, or no run of it is over, or ``out`` cannot be written.
    """
    prepare_file(out)
    stages = sorted(path.parent for path in [*folder.glob(STAGE), *folder.glob(f"*/{STAGE}")])
    require(bool(stages), "folder", str(folder), "that of a sweep, or of a stage, with a stage.json")
    files = {path: content for stage in stages for path, content in _files(stage, folder)}
    runs = sum(path.name == "result.json" for path in files)
    require(runs > 0, "folder", str(folder), "one with runs that are over")
    # Times, owners and the name of the file would tell equal archives apart.
    with (
        replacing(out) as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path, content in files.items():
            entry = tarfile.TarInfo(path.as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return runs


def _files(stage: Path, root: Path) -> Iterator[tuple[PurePath, bytes]]:
    described = read_json(stage / STAGE)
    described["base"]["task"] = without_paths(described["base"]["task"])
    yield (stage / STAGE).relative_to(root), _line(described)
    for path in sorted(stage.glob("runs/*/result.json")):
        run = RunFolder(path.parent)
        config = read_json(run.config_file)
        config["config"]["task"] = without_paths(config["config"]["task"])
        yield run.config_file.relative_to(root), _line(config)
        yield run.metrics_file.relative_to(root), b"".join(map(_line, thinned(run.metrics())))
        yield run.result_file.relative_to(root), _line(read_json(run.result_file))


def thinned(metrics: Metrics) -> Metrics:
    """All validations, and about :data:`STEPS` of the steps, the last one among them, rounded."""
    steps = [line["step"] for line in metrics if "loss" in line]
    every = max(1, len(steps) // STEPS)
    kept = set(steps[::-1][::every])
    return [
        _rounded(line) if "loss" in line else line for line in metrics if "loss" not in line or line["step"] in kept
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, allow_nan=False) + "\n").encode()
