"""``mada bounds``."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mada_lab.cli.main import main
from mada_lab.theory.figures import Setting

SMALL = ["--steps", "200", "--dimension", "2", "--seeds", "2"]


def test_bounds_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bounds", *SMALL, "--beta2", "0.99", "--out", str(tmp_path / "figure")]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}
    best, bound = Setting(beta2=0.99, steps=200, dimension=2).best()
    assert f"best    ρ = {best:<9.3g}bound {bound:.4g}" in out


def test_the_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bounds", "--help"])
    options = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for field in fields(Setting):
        stated = re.search(rf"--{field.name.replace('_', '-')} .*?default: ([^)]*)", options)
        assert stated is not None, field.name
        assert float(stated[1]) == field.default, field.name


def test_the_default_is_the_papers_setting_and_its_best_rho_lies_inside() -> None:
    setting = Setting()
    assert (setting.beta2, setting.steps) == (0.9, 10_000)
    best, bound = setting.best()
    assert 0 < best < 1
    assert bound < setting.dimension * (setting.gradient_bound - setting.eps) ** 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta2", "1.5"], "beta2 must be in (0, 1), got 1.5"),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--gap", "-1"], "gap must be a finite number >= 0, got -1.0"),
        (["--eps", "1"], "eps must be positive and below gradient_bound, got 1.0"),
        (["--seeds", "0"], "seeds must be an integer >= 1, got 0"),
        (["--smoothness", "0"], "smoothness must be > 0 for a quadratic, got 0.0"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bounds", *options, "--out", str(tmp_path / "figure")]) == 2
    assert capsys.readouterr() == ("", f"mada: {message}\n")
    assert not list(tmp_path.iterdir())
