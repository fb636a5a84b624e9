from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mada_optim
from mada_optim.cli import main

MODEL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4"]
TINY = [*MODEL, "--steps", "12", "--eval-every", "6", "--threads", "1"]


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["sweep"], ["report"], ["optimizers"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: mada" in capsys.readouterr().out


def test_help_imports_no_experiment() -> None:
    code = "import sys, mada_optim.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "'transformers'" not in out
    assert "'matplotlib'" not in out
    assert "'plotly'" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mada {mada_optim.__version__}\n"


def test_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizers"]) == 0
    assert "avgrad " in capsys.readouterr().out


def test_train_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", *TINY, "--out", out, "--rho", "0.5", "--hyper-lr", "rho=0.1", "c=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "step 12/12" in printed
    assert "ρ 0.500" in printed
    assert main(["train", "--resume", out]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", str(tmp_path / "run"), "--optimizer", "adamw", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("ray_session")
def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "grid")
    grid = ["--optimizers", "adamw,avgrad", "--lrs", "1e-2", "--seeds", "2", "--out", out]
    assert main(["compare", *TINY, *grid]) == 0
    first = capsys.readouterr().out
    assert "4/4" in first
    assert main(["compare", "--report", out]) == 0
    assert capsys.readouterr().out in first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--data", "nowhere.txt"], "nowhere.txt', which does not exist"),
        (["train", "--optimizer", "adamx"], "optimizer must be one of"),
        (["train", "--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["train", "--width", "10", "--heads", "4"], "width must be a multiple of heads (4), got 10"),
        (["train", "--hyper-lr", "rho"], "hyper_lr must be a number or name=number pairs, got 'rho'"),
        (["train", "--resume", "nowhere"], "resume must be the folder of a run, got 'nowhere'"),
        (["train", "--resume", "x", "--lr", "1", "--steps", "2"], "leave out --lr, --steps"),
        (["compare", "--workers", "0"], "workers must be a positive integer, got 0"),
        (["compare", "--seeds", "0"], "seeds must be a list that is not empty"),
        (["compare", "--report", "nowhere"], "has no stage.json"),
        (["report", "nowhere"], "folder must be that of a sweep, a stage or a run, with tune/stage.json"),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("mada: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("mada_optim.experiments")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["optimizers"]) == 2
    assert "pip install 'mada-optim[experiments]'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["online", "--steps", "100", "--out", str(tmp_path / "missing" / "online")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
