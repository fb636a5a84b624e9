from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

import mada_optim
from mada_lab.cli.main import COMMANDS, main
from mada_lab.optimizers.registry import ENTRIES
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import StepReport, train
from mada_lab.theory.online_problems import play

MODEL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4"]
TINY = [*MODEL, "--steps", "12", "--eval-every", "6", "--threads", "1"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: mada" in capsys.readouterr().out


def test_help_waits_for_no_other_package() -> None:
    code = """
import sys
from mada_lab.cli.main import COMMANDS, main
for command in ([], *([name] for name in COMMANDS)):
    try:
        main([*command, "--help"])
    except SystemExit:
        pass
packages = {name.partition(".")[0] for name in sys.modules}
print("imported:", *sorted(packages - set(sys.stdlib_module_names) - {"__main__", "mada_lab"}))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    imported = out.splitlines()[-1].split()[1:]
    assert not {"mada_optim", "matplotlib", "numpy", "plotly", "rich", "torch", "transformers"} & set(imported)


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


@pytest.mark.usefixtures("without_ray")
def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "grid")
    grid = ["--optimizers", "adamw,avgrad", "--lrs", "1e-2", "--seeds", "2", "--out", out]
    assert main(["compare", *TINY, *grid]) == 0
    first = capsys.readouterr().out
    assert "4/4" in first
    assert main(["compare", "--report", out]) == 0
    assert capsys.readouterr().out in first
    assert main(["compare", *TINY, *grid]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 of 4 runs are over and kept, 0 to train.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--data", "nowhere.txt"], "nowhere.txt', which does not exist"),
        (["train", "--optimizer", "adamx"], "optimizer must be one of"),
        (["train", "--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["train", "--width", "10", "--heads", "4"], "width must be a multiple of heads (4), got 10"),
        (["train", "--hyper-lr", "rho"], "hyper_lr must be a number or name=number pairs, got 'rho'"),
        (["train", "--hyper-lr", "c=1", "c=2"], "hyper_lr must name each coefficient once, got 'c=1 c=2'"),
        (["train", "--resume", "nowhere"], "resume must be the folder of a run, got 'nowhere'"),
        (["train", "--resume", "x", "--lr", "1", "--steps", "2"], "leave out --lr, --steps"),
        (["train", "--resume", "x", "--task", "vision"], "leave out --task\n"),
        (["compare", "--workers", "-1"], "workers must be a positive integer, or 0 (in this process), got -1"),
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


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["train"], "tensorboard"),
        (["demo"], "filelock"),
        (["compare"], "matplotlib"),
        (["report", "x"], "plotly"),
        (["online"], "rich"),
    ],
)
def test_missing_extras_are_named_before_anything_runs(
    command: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command) == 2
    assert capsys.readouterr() == ("", f"mada: {package} is missing: pip install 'mada-optim[lab]'\n")


def test_optimizers_are_listed_without_the_extras() -> None:
    extras = ["datasets", "filelock", "matplotlib", "numpy", "plotly", "ray", "rich", "tensorboard", "transformers"]
    code = "import sys, torch\nsys.modules.update(dict.fromkeys(sys.argv[1:]))\nimport mada_lab.cli.main as c\n"
    command = [sys.executable, "-c", code + "sys.exit(c.main(['optimizers']))", *extras]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    lr, description = header.index("lr"), rows[0].index(ENTRIES["adam"].description)
    for row, (name, entry) in zip(rows, ENTRIES.items(), strict=True):
        cells = row[:lr].rstrip(), row[lr:description].rstrip(), row[description:]
        assert cells == (name, f"{entry.lr:g}", entry.description)
        assert row[lr - 2 : lr] == row[description - 2 : description] == "  "


@pytest.mark.parametrize(
    ("arguments", "usage", "hint"),
    [
        (["train", "--optimzer", "mada"], "usage: mada train ", "--optimzer mada; did you mean --optimizer?"),
        (["compare", "--sedes=3"], "usage: mada compare ", "--sedes=3; did you mean --seeds?"),
        (["online", "--qwxz"], "usage: mada online ", "--qwxz\n"),
        (["pack", "runs", "more"], "usage: mada pack ", "unrecognized arguments: more\n"),
        (["trian"], "usage: mada [-h]", "did you mean train?"),
        (["train", "--steps", "x"], "usage: mada train ", "invalid int value: 'x'\n"),
    ],
)
def test_a_mistyped_option_shows_the_usage_of_its_command(
    arguments: list[str], usage: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(usage)
    assert hint in error


@pytest.mark.parametrize(
    ("name", "options", "lr"),
    [("lion", [], 1e-3), ("prodigy", [], 1.0), ("adamw", [], 3e-3), ("lion", ["--lr", "2"], 2)],
)
def test_each_optimizer_has_a_default_rate(name: str, options: list[str], lr: float, tmp_path: Path) -> None:
    main(["train", *MODEL, "--steps", "1", "--optimizer", name, *options, "--out", str(tmp_path / "run"), "--quiet"])
    assert RunFolder(tmp_path / "run").config().optimizer.lr == lr


def test_nothing_is_said_before_a_running_run_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 12:
            assert main(["train", "--resume", str(tmp_path / "run")]) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_config("adamw"), tmp_path / "run", on_step=stop)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mada: another process is writing into")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "Going on from step 10."
    assert second.startswith("step 11/30")


# Files to be written. test_report.py and test_archive.py have more of it.

COMPUTED_FIRST = {
    "bounds": ["bounds", "--steps", "100", "--dimension", "2", "--seeds", "1"],
    "online": ["online", "--steps", "100"],
}


@pytest.mark.parametrize("command", COMPUTED_FIRST)
def test_folders_of_a_figure_are_made(command: str, tmp_path: Path) -> None:
    assert main([*COMPUTED_FIRST[command], "--out", str(tmp_path / "a" / "b" / "figure")]) == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"figure.png", "figure.svg"}


@pytest.mark.parametrize("command", [*COMPUTED_FIRST, "report", "pack"])
def test_what_cannot_be_written_is_said_before_anything_is_computed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("computed first")

    monkeypatch.setattr("mada_lab.theory.online.play", online_once(never))
    for place in ("stage_folder.load_stage", "archive.read_json"):
        monkeypatch.setattr(f"mada_lab.sweep.{place}", never)
    monkeypatch.setattr("mada_lab.theory.figures.mean_squared_gradient", never)
    (tmp_path / "file").touch()
    (tmp_path / "stage.json").write_text("{}")
    arguments = COMPUTED_FIRST.get(command, [command, str(tmp_path)])
    assert main([*arguments, "--out", str(tmp_path / "file" / "figure")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mada: out must be a file that can be written, got")
    assert error.count("\n") == 1


def online_once(never: Callable[..., None]) -> Callable[..., Any]:
    """A single step is played to check the settings."""
    return lambda slopes, *rest: play(slopes, *rest) if len(slopes) == 1 else never()


def test_completion_knows_commands_options_and_what_they_mean() -> None:
    pytest.importorskip("argcomplete")
    assert complete("mada swe") == ["sweep"]
    assert complete("mada train --weight") == ["--weight-decay"]
    (explained,) = complete("mada train --weight", _ARGCOMPLETE_SHELL="zsh", _ARGCOMPLETE_SUPPRESS_SPACE="1")
    assert explained == "--weight-decay:decoupled, on tensors of 2 and more dimensions (default: 0.1)"


def complete(line: str, **variables: str) -> list[str]:
    """Return what a shell would show for a line. argcomplete writes to the file descriptor 8."""
    code = "import os\nos.dup2(1, 8)\nimport mada_lab.cli.main as c\nc.main()"
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    } | variables
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    return [completion.strip() for completion in done.stdout.splitlines()]
