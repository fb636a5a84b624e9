"""What ``mada`` says at its front: next steps, examples that can be run, results for scripts, a summary first."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_cli import TINY
from tiny import tiny_config

from mada_lab.cli.main import COMMANDS, build_parser, main
from mada_lab.report.report_file import write_report
from mada_lab.run.config import resolve
from mada_lab.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_ray")

PARSERS = next(action for action in build_parser()._actions if action.metavar == "COMMAND").choices


def test_mada_alone_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "mada demo" in lines[1]


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Return the arguments of each example in an epilog: up to two spaces, after which it is explained."""
    lines = re.findall(r"^  (?:torchrun .* -m mada_lab|mada) ?(.*?)(?:  .*)?$", parser.epilog or "", re.MULTILINE)
    whole = re.findall(r"&& mada (.*)$", parser.epilog or "", re.MULTILINE)
    return [shlex.split(line.partition(" && ")[0]) for line in lines + whole]


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_the_help_of_each_command_has_examples_that_parse(name: str | None) -> None:
    shown = examples(build_parser() if name is None else PARSERS[name])
    assert shown
    for arguments in shown:
        parsed = build_parser().parse_args([word.replace("NAME", "name") for word in arguments])
        assert parsed.command.__name__ == f"mada_lab.cli.{arguments[0]}"
    if name is not None:
        assert any(arguments[0] == name for arguments in shown)


def test_a_file_and_a_line_make_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    greet = ModuleType("mada_lab.cli.greet")
    greet.SUMMARY, greet.EPILOG, greet.NEEDS = "greet", "examples:\n  mada greet\n", ()
    greet.add_options = lambda parser: parser.add_argument("--name", help="(default: nobody)")
    greet.run = lambda arguments: (0, {"name": getattr(arguments, "name", "nobody")})
    monkeypatch.setitem(sys.modules, greet.__name__, greet)
    monkeypatch.setattr("mada_lab.cli.main.COMMANDS", (*COMMANDS, "greet"))
    assert document(capsys, "greet", "--name", "Ada") == {"name": "Ada"}
    assert document(capsys, "greet") == {"name": "nobody"}


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Return what a command prints with --json; its standard output has to be that alone."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_results_of_trainings_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, grid = str(tmp_path / "run"), str(tmp_path / "grid")
    trained = document(capsys, "train", *TINY, "--out", run)
    assert trained["status"] == "finished"
    assert trained["folder"] == run
    assert document(capsys, "train", "--resume", run)["val_loss"] == trained["val_loss"]

    choice = ["--optimizers", "adamw,mada", "--lrs", "1e-3,1e-2", "--seeds", "1"]
    compared = document(capsys, "compare", *choice, *TINY, "--out", grid)
    assert [entry["optimizer"] for entry in compared["results"]] == ["adamw", "mada"]
    assert " won at learning rate 0.01 (the highest of its grid)." in compared["summary"]

    assert main(["compare", "--report", grid]) == 0
    printed = capsys.readouterr()
    assert compared["summary"] in " ".join(printed.out.split())
    assert re.search("adamw +[▁▂▃▄▅▆▇█]{2} +[▁▂▃▄▅▆▇█]{3}", printed.out)
    assert "of mada, 0.01, is the highest of its grid; a better one may lie beyond: add --lrs 0.03" in printed.err

    reported = document(capsys, "report", grid, run, "--out", str(tmp_path / "all.md"))
    text = (tmp_path / "all.md").read_text("utf-8")
    assert text.split("\n\n")[1:3] == reported["summary"]
    (sentence,) = document(capsys, "report", grid, "--out", str(tmp_path / "all.html"))["summary"]
    assert sentence.endswith(f": {compared['summary']}")
    page = (tmp_path / "all.html").read_text("utf-8")
    assert page.index('<p class="summary">') < page.index("<table>")


def test_results_of_other_commands_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {entry["name"]: entry["lr"] for entry in document(capsys, "optimizers")}
    assert (known["mada"], known["lion"]) == (3e-3, 1e-3)
    played = document(capsys, "online", "--problem", "theorem", "--steps", "30")
    assert played["optimizers"]["AMSGrad"]["rho"] == [None]
    assert len(played["optimizers"]["Adam"]["iterates"]) == 1
    assert document(capsys, "bounds", "--steps", "50", "--seeds", "1")["bounds"][2]["rho"] == 1.0


def test_the_report_of_a_run_that_has_not_been_validated_has_no_empty_table(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.create(resolve(tiny_config()), {"source": "a text", "init": None})
    run.metrics_file.write_text('{"step": 1, "loss": 4.0, "lr": 0.1, "step_seconds": 0.1, "optimizer_seconds": 0.1}\n')
    write_report([run.path], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "The run is not over. It is at step 1." in text.split("\n\n")[1]
    assert "diverged" not in text
    assert "| - |" not in text
