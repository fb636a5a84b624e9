"""Modules that were documented in the library and are in the laboratory now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mada_optim import cli


def test_the_former_module_warns_and_runs_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(DeprecationWarning, match="use python -m mada_lab"):
        assert cli.main(["optimizers"]) == 0
    assert "avgrad " in capsys.readouterr().out


def test_the_former_module_is_still_run_by_python() -> None:
    command = [sys.executable, "-m", "mada_optim.cli", "pack", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "DeprecationWarning: mada_optim.cli is deprecated; use python -m mada_lab" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mada: ")


def test_theory_is_still_found() -> None:
    """In a new process: a module warns where it is first imported."""
    code = (
        "import mada_optim.theory, mada_lab.theory\n"
        "from mada_optim.theory import best_rho\n"
        "from mada_optim.theory.bounds import avgrad_bound\n"
        "assert best_rho is mada_lab.theory.best_rho\n"
        "assert not hasattr(mada_optim.theory, 'nope')"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<string>:1: DeprecationWarning: mada_optim.theory is deprecated; use mada_lab.theory" in done.stderr
