"""``mada online``."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mada_lab.cli.main import main
from mada_lab.display.progress import StepsDisplay
from mada_lab.theory import online
from mada_lab.theory.online import Setting
from mada_lab.theory.online_problems import PROBLEMS

NUMBER = r"-?\d+\.\d+"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_table_and_figure(problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--problem", problem, "--steps", "60", "--seeds", "2", "--out", str(tmp_path / "figure")]
    assert main(["online", *options]) == 0
    header, *rows, written = capsys.readouterr().out.splitlines()
    assert header.split() == ["final", "iterate", "average", "regret", "final", "ρ"]
    cell = NUMBER + (rf" ± {NUMBER}" if problem == "stochastic" else "")
    for row, name in zip(rows, ("Adam", "AMSGrad", "AVGrad", "MADA from Adam", "MADA from ρ = 0"), strict=True):
        assert re.fullmatch(rf"{name}( +{cell}){{{2 if name == 'AMSGrad' else 3}}}", row), row
    assert written == f"Written: {tmp_path / 'figure.png'}, {tmp_path / 'figure.svg'}"
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}
    # Each line is named where it ends, in the panels that it is in.
    drawn = (tmp_path / "figure.svg").read_text("utf-8")
    assert (drawn.count("AMSGrad "), drawn.count("MADA from Adam ")) == (2, 3)


def test_the_table_is_that_of_the_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--betas", "0", "0.5", "--alpha", "0.3", "--steps", "40", "--hyper-lr", "0.7", "--problem", "theorem"]
    assert main(["online", *options, "--out", str(tmp_path / "figure")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("MADA from Adam"))
    setting = Setting("theorem", (0.0, 0.5), 0.3, 40, 0.7)
    (trace,) = setting.play(setting.learned(1.0))
    values = trace.iterates[-4:].mean(), trace.average_regret[-1], trace.rho[-4:].mean()
    assert [float(cell) for cell in row.split()[-3:]] == pytest.approx([value.item() for value in values], abs=5e-3)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("steps", [1, 250, 303])  # of periods of 3, 100 and 101
def test_the_figure_says_what_the_table_says(
    problem: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--problem", problem, "--steps", str(steps), "--seeds", "2", "--out", str(tmp_path / "figure")]
    assert main(["online", *options]) == 0
    drawn = (tmp_path / "figure.svg").read_text("utf-8")
    for row in capsys.readouterr().out.splitlines()[1:-1]:
        name, *cells = re.split(r"  +", row)
        for cell in cells if name.startswith("MADA") else cells[:2]:  # the figure shows ρ where it is learned
            assert f">{name}  {cell.split(' ±')[0]}<" in drawn, row


def test_the_lines_of_the_figure_end_with_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(online, "save_figure", lambda figure, path: figures.append(figure))
    setting = Setting("periodic", steps=250)
    online.draw_online(setting, {name: setting.play(make) for name, make in setting.contenders().items()}, tmp_path)
    assert {line.get_xdata()[-1] for axes in figures[0].axes for line in axes.get_lines()} == {250}


def test_wide_numbers_keep_their_distance() -> None:
    row = online._line("MADA from ρ = 0", "-0.12 ± 12345.67", "123456.789 ± 12345.678", "0.50 ± 12345.67")
    assert len(re.split("  +", row)) == 4


@pytest.mark.parametrize(("options", "plays"), [([], 5), (["--scan"], 3 * 10), (["--problem", "stochastic"], 5 * 4)])
def test_progress(options: list[str], plays: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    done = StepsDisplay.__exit__

    def leave(self: StepsDisplay, *rest: Any) -> None:
        seen.extend((self._done, self._total))
        done(self, *rest)

    monkeypatch.setattr(StepsDisplay, "__exit__", leave)
    if "--scan" in options:
        options = [*options, "--problem", "theorem"]
    assert main(["online", *options, "--steps", "20", "--out", str(tmp_path / "figure")]) == 0
    assert seen == [20 * plays] * 2


def test_scan(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["online", "--problem", "theorem", "--steps", "60", "--scan"]) == 0
    learned, held = capsys.readouterr().out.strip().split("\n\n")
    assert learned.startswith("| β1, β2 | Adam | AVGrad | MADA from Adam, 0.01 |")
    assert held.startswith("| β1, β2 | ρ = 1 |")
    for table, cell in ((learned, rf"{NUMBER} \(ρ {NUMBER}\)"), (held, rf"{NUMBER} \(h {NUMBER}\)")):
        header, _, *rows = table.splitlines()
        assert len({line.count("|") for line in table.splitlines()}) == 1, header
        assert "0, 0.1" in rows[0]
        assert all(re.search(cell, row) for row in rows)
    assert not list(tmp_path.iterdir())


def test_the_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["online", "--help"])
    options = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for field in fields(Setting):
        if field.default is False:
            assert f"--{field.name}" in options  # a flag, which is not set by default
            continue
        stated = re.search(rf"--{field.name.replace('_', '-')} .*?default: ([^)]*)", options)
        assert stated is not None, field.name
        if field.name == "betas":
            expected = [Setting(problem).resolved_betas for problem in ("periodic", "theorem")]
            assert stated[1] == "{} {}; theorem: {:g} {}".format(*expected[0], *expected[1])
        else:
            assert stated[1] == f"{field.default}".removesuffix(".0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problem", "x"], "problem must be one of theorem, periodic, stochastic, got 'x'"),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--seeds", "0"], "seeds must be an integer >= 1, got 0"),
        (["--alpha", "0"], "alpha must be a finite number > 0, got 0.0"),
        (["--betas", "1.5", "0.9"], "beta1 must be a number in [0.0, 0.9999999999999999], its domain, got 1.5"),
        (["--hyper-lr", "-1"], "hyper_lr of rho must be a finite number >= 0, got -1.0"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["online", *options, "--out", str(tmp_path / "figure")]) == 2
    assert capsys.readouterr() == ("", f"mada: {message}\n")
    assert not list(tmp_path.iterdir())
