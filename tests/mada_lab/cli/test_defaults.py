"""A default that a help text states is the one that counts: giving it changes nothing."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from problems import STARTS
from torch import nn

from mada_lab.cli import train
from mada_lab.cli.defaults import as_text, declared
from mada_lab.cli.main import COMMANDS, build_parser
from mada_lab.cli.option_groups import run_config
from mada_lab.cli.options import HelpFormatter, chosen
from mada_lab.demo.experiment import GUESS
from mada_lab.optimizers.build import build, resolve_optimizer
from mada_lab.optimizers.registry import ENTRIES
from mada_lab.report.results import REFERENCE
from mada_lab.tasks.packing import pack
from mada_lab.tasks.registry import TASKS, task_type
from mada_lab.theory import figures, online, scale_figure
from mada_lab.theory.online_problems import PROBLEMS

PARSER = build_parser()
PARSERS = next(action for action in PARSER._actions if action.metavar == "COMMAND").choices
REQUIRED = {
    "tokens": ["--data", "text", "--out", "folder"],
    "sweep": ["file"],
    "report": ["folder"],
    "pack": ["folder"],
}
SETTINGS: dict[str, Any] = {"bounds": figures.Setting, "online": online.Setting, "scale": scale_figure.Setting}

# Texts that are no value which could be given. What they say of numbers is tested below.
DESCRIBED = {
    "--address": ["this machine alone"],
    "--augment": ["all but the digits"],
    "--autocast": ["no; tokens: where there is a GPU"],
    "--data": ["Python's language reference", "scikit-learn's digits"],
    "--data-root": ["here"],
    "--device": ["cuda where there is one, else cpu"],
    "--hyper-lr": ["5e-4 for beta1, 0 for beta2, 0.1 for the others"],
    "--lr": [f"{as_text(GUESS)}, which is ten times too low for AdamW"],
    "--only": ["all"],
    "--out": [f"runs/TIME-{name}" for name in ("OPTIMIZER", "NAME", "demo", "compare", "bench")],
    "--reference": [REFERENCE],
    "--stage": ["both"],
    "--threads": ["torch's choice"],
}
DESCRIBED["--out"] += ["the folder's name with .tar.gz, here"]
DESCRIBED["--out"] += ["report.html in the first folder, or here where that cannot be written to"]

STATED = [
    (command, action.option_strings[0], text)
    for command in COMMANDS
    for action in PARSERS[command]._actions
    for text in re.findall(r"\(default: ([^)]*)\)", HelpFormatter("mada")._expand_help(action))
]
VALUES = [(command, option, text) for command, option, text in STATED if text not in DESCRIBED.get(option, ())]


def test_the_defaults_are_found() -> None:
    assert len(VALUES) > 64
    described = {(option, text) for _, option, text in STATED} - {(option, text) for _, option, text in VALUES}
    assert described == {(option, text) for option, texts in DESCRIBED.items() for text in texts}


@pytest.mark.parametrize(("command", "option", "text"), VALUES)
def test_giving_a_default_changes_nothing(command: str, option: str, text: str) -> None:
    for case, value in cases(option, text):
        assert outcome(command, *case, option, *value.split()) == outcome(command, *case)


def test_other_values_change_something() -> None:
    for options in (["--steps", "999"], ["--betas", "0.8", "0.99"], ["--lr", "0.1"], ["--rho", "0.5"], ["--seed", "1"]):
        assert outcome("train", *options) != outcome("train")


def test_the_optimizers_with_a_rate_of_their_own_are_named() -> None:
    (text,) = (text for command, option, text in VALUES if (command, option) == ("train", "--lr"))
    own = {name for name, entry in ENTRIES.items() if entry.lr != declared("mada_lab.optimizers.registry:LR")}
    assert set(re.findall(r"(\w+): ", text)) == own


def test_step_sizes_of_coefficients_are_those_that_the_help_states() -> None:
    (text,) = DESCRIBED["--hyper-lr"]
    stated = re.fullmatch("(.*) for beta1, 0 for beta2, (.*) for the others", text)
    assert stated is not None
    step_sizes = [f"beta1={stated[1]}", *(f"{name}={stated[2]}" for name in STARTS)]
    assert outcome("train", "--hyper-lr", *step_sizes) == outcome("train")


@pytest.mark.parametrize("reference", ["mada_lab.run.config:RunConfig.nothing", "mada_lab.tasks.packing:pack.corpus"])
def test_a_default_that_is_not_declared_is_no_default(reference: str) -> None:
    with pytest.raises(KeyError):
        declared(reference)


def cases(option: str, text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the options under which a default holds, and the default: ``12; tokens: 480`` has two."""
    field = option.removeprefix("--").replace("-", "_")
    for part in re.split("[;,] ", text):
        name, _, value = part.rpartition(": ")
        if not name:
            having = [kind for kind in TASKS if field in (item.name for item in dataclasses.fields(task_type(kind)))]
            name = having[0] if having else ""
        for selector, names in (("--task", TASKS), ("--optimizer", ENTRIES), ("--problem", PROBLEMS)):
            if name in names:
                yield [selector, name], value
                break
        else:
            assert name == ""
            yield [], value


def outcome(command: str, *words: str) -> Any:
    """Return what a command makes of its options."""
    arguments = PARSER.parse_args([command, *REQUIRED.get(command, []), *words])
    values = {name: value for name, value in vars(arguments).items() if name not in ("task", "optimizer")}
    if command in SETTINGS:
        setting = SETTINGS[command](**chosen(arguments, SETTINGS[command]))
        return arguments.out, online_resolved(setting) if command == "online" else setting
    if command == "tokens":
        options = {name: value for name, value in values.items() if name in ("tokenizer", "val_share")}
        bound = inspect.signature(pack).bind("corpus", "out", **options)
        bound.apply_defaults()
        return bound.arguments
    if command in ("train", "demo", "compare"):
        config = train.config_of(arguments) if command == "train" else run_config(arguments)
        optimizer = resolve_optimizer(config.optimizer)
        described = str(build(optimizer, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
        grid = [values.get(name) for name in ("optimizers", "lrs", "seeds", "workers")]
        return dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, options={})), described, grid
    return values


def online_resolved(setting: online.Setting) -> online.Setting:
    return dataclasses.replace(setting, betas=setting.resolved_betas)
