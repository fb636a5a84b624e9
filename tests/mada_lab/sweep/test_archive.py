from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from mada_lab.cli.main import main
from mada_lab.sweep.archive import STEPS, thinned

FILE = """
title = "Tiny"
[base]
task = { data = "text.txt", layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }
steps = 120
eval_every = 60
threads = 1
[axes]
"optimizer.lr" = [1e-3]
seed = [0]
[confirm]
steps = 10
seeds = [0]
[contenders.adamw]
name = "adamw"
[contenders.mada]
name = "mada"
"""
TEXT = "To be, or not to be, that is the question: " * 40


@pytest.mark.usefixtures("without_ray")
def test_a_packed_sweep_goes_on_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.toml"
    file.write_text(FILE)
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    for place, text in ((here, TEXT), (there, TEXT), (other, TEXT.upper())):
        place.mkdir()
        (place / "text.txt").write_text(text)

    def sweep(place: Path, out: Path, *more: str) -> int:
        return main(["sweep", str(file), "--data-root", str(place), "--out", str(out), *more])

    runs = tmp_path / "runs"
    assert sweep(here, runs, "--only", "adamw") == 0
    packed = [tmp_path / name for name in ("one.tar.gz", "two.tar.gz")]
    for out in packed:
        assert main(["pack", str(runs), "--out", str(out)]) == 0
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert b"".join(path.read_bytes() for path in runs.rglob("*.json")).count(str(here).encode()) > 0
    again = tmp_path / "again"
    with tarfile.open(packed[0]) as archive:
        archive.extractall(again, filter="data")
    kept = [path for path in again.rglob("*") if path.is_file()]
    assert {path.name for path in kept} == {"stage.json", "config.json", "metrics.jsonl", "result.json"}
    assert all(str(tmp_path) not in path.read_text() for path in kept)

    for stage in ("tune", "confirm"):
        assert main(["compare", "--report", str(runs / stage)]) == 0
        assert main(["compare", "--report", str(again / stage)]) == 0
        tables = [(folder / stage / "table.md").read_text() for folder in (runs, again)]
        assert tables[0] == tables[1]

    capsys.readouterr()
    assert sweep(other, again) == 2
    assert "is a run on other data (sha256: " in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*seed0/result.json")}
    assert sweep(there, again) == 0
    after = {path: path.stat().st_mtime_ns for path in again.rglob("*seed0/result.json")}
    assert len(after) == 4
    assert before == {path: after[path] for path in before}


def test_thinned() -> None:
    steps = [{"step": step, "loss": 1 / 3, "coefficients": {"rho": 2 / 3}} for step in range(1, 1001)]
    validations = [{"step": step, "val_loss": 1.0} for step in range(0, 1001, 7)]
    kept = thinned([*steps, *validations])
    assert [line for line in kept if "loss" not in line] == validations
    assert [line["step"] for line in kept if "loss" in line] == list(range(20, 1001, 1000 // STEPS))
    assert kept[0]["loss"] == 0.333333
    assert kept[0]["coefficients"] == {"rho": 0.666667}
    short = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    assert thinned(short) == short


def test_what_cannot_be_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path)]) == 2
    assert "with a stage.json" in capsys.readouterr().err
    stage = {"title": "T", "stage": None, "threshold": None, "contenders": {}, "base": {"task": {"kind": "vision"}}}
    (tmp_path / "stage.json").write_text(json.dumps(stage))
    assert main(["pack", str(tmp_path), "--out", str(tmp_path / "out.tar.gz")]) == 2
    assert "runs that are over" in capsys.readouterr().err
    assert not (tmp_path / "out.tar.gz").exists()
