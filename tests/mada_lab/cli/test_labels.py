"""``--only``, with labels that have commas in them, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mada_lab.cli.main import main

WHOLE = "omada, rows normalized"
FILE = f"""
title = "Tiny"
[base]
task = {{ layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }}
steps = 2
eval_every = 2
threads = 1
[axes]
"optimizer.lr" = [1e-3]
seed = [0]
[contenders.adamw]
name = "adamw"
[contenders.muon]
name = "muon"
[contenders."{WHOLE}"]
name = "adam"
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """The folder of a sweep that was run with ``--only`` and a whole label."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "file.toml").write_text(FILE)
    out = folder / "out"
    assert main(["sweep", str(folder / "file.toml"), "--out", str(out), "--only", WHOLE, "--only", "adamw,muon"]) == 0
    return out


def test_a_sweep_trains_the_contender_of_a_whole_label(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text(FILE)
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "file.toml"), "--out", str(out), "--only", WHOLE]) == 0
    assert [path.parent.name for path in out.glob("tune/runs/*/result.json")] == ["omada_rows_normalized-lr0.001-seed0"]


def test_each_contender_that_is_named_is_trained(sweep: Path) -> None:
    assert len(list(sweep.glob("tune/runs/*/result.json"))) == 3


@pytest.mark.parametrize("folder", ["", "tune"])
def test_a_figure_shows_the_contender_of_a_whole_label(
    folder: str, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mada_lab.report.rates_figure.by_task", lambda stages, labels: asked.extend(labels) or [])
    monkeypatch.setattr("mada_lab.report.rates_figure.draw_rates", lambda tasks, out: None)
    only = ["--only", WHOLE, "--only", "muon,adamw"]
    assert main(["report", str(sweep / folder), *only, "--out", str(tmp_path / "rates.png")]) == 0
    assert asked == [WHOLE, "muon", "adamw"]


@pytest.mark.parametrize("text", ["omada", "omada,rows normalized"])
def test_a_part_of_a_label_is_none(text: str, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", str(sweep.parent / "file.toml"), "--out", str(sweep), "--only", text]
    assert main(arguments) == 2
    assert "only must be one of 'adamw', 'muon', 'omada, rows normalized', got 'omada'" in capsys.readouterr().err
