"""A run is resolved once, before anything is written; what follows takes it as it is."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.optimizers import build
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run import config as run_config
from mada_lab.run.config import ResolvedRun, RunConfig, resolve, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.sweep.comparison import comparison
from mada_lab.sweep.experiment_file import load
from mada_lab.sweep.plan import Plan
from mada_lab.sweep.run_stages import Ending, run_stages
from mada_lab.sweep.stage_folder import CONFIRM, TUNE, load_stage

REPOSITORY = Path(__file__).parents[3]
RESOLVED, BUILT, IN_TRAINING = "resolved", "optimizers built", "optimizers built in training"

TWO_STAGES = """
[base]
task = { kind = "language", layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }
steps = 4
eval_every = 2
threads = 1
[axes]
"optimizer.lr" = [1e-3, 1e-2]
seed = [0]
[confirm]
seeds = [1, 2]
[contenders.mada]
name = "mada"
[contenders.fixed]
name = "mada"
coefficients_from = "mada"
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a run was resolved and an optimizer was built, whoever did it, under whatever name he knows them."""
    counts: Counter[str] = Counter()
    real_resolve, real_build = run_config.resolve, build.build

    def counted_resolve(config: RunConfig) -> ResolvedRun:
        counts[RESOLVED] += 1
        return real_resolve(config)

    def counted_build(*arguments: Any) -> torch.optim.Optimizer:
        in_training = sys._getframe(1).f_globals["__name__"] == "mada_lab.run.train"
        counts[IN_TRAINING if in_training else BUILT] += 1
        return real_build(*arguments)

    for module in [module for name, module in sys.modules.items() if name.startswith("mada_lab.")]:
        for name, value in list(vars(module).items()):
            if value is real_resolve:
                monkeypatch.setattr(module, name, counted_resolve)
            elif value is real_build:
                monkeypatch.setattr(module, name, counted_build)
    return counts


@pytest.mark.usefixtures("without_ray")
def test_each_run_of_a_comparison_is_resolved_once(tmp_path: Path, calls: Counter[str]) -> None:
    model = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--val-windows", "8"]
    grid = ["--optimizers", "adamw,muon", "--lrs", "1e-3,1e-2", "--seeds", "2", "--steps", "2", "--eval-every", "2"]
    command = ["compare", *model, *grid, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert calls == {RESOLVED: 8, BUILT: 8, IN_TRAINING: 8}
    calls.clear()
    assert main(command) == 0
    assert calls == {RESOLVED: 8, BUILT: 8}


@pytest.mark.usefixtures("without_ray")
def test_what_is_known_later_takes_no_second_resolving(tmp_path: Path, calls: Counter[str]) -> None:
    (tmp_path / "file.toml").write_text(TWO_STAGES)
    folders = {stage: tmp_path / stage for stage in (TUNE, CONFIRM)}
    ending = run_stages(load(tmp_path / "file.toml"), folders, 1, lambda _: None)
    assert not ending.failed
    assert not ending.left_out
    # Two learning rates and then two seeds, of two contenders. One optimizer more says which coefficients there are.
    assert calls == {RESOLVED: 8, BUILT: 9, IN_TRAINING: 8}
    for stage, folder in folders.items():
        for path in folder.glob("runs/*"):
            stored = RunFolder(path).config()
            assert stored == resolve(stored) == run_config.resolve(RunConfig(**vars(stored))), (stage, path.name)


@pytest.mark.usefixtures("without_ray")
def test_a_contender_at_the_best_rate_of_another(tmp_path: Path) -> None:
    follower = '[contenders.follower]\nname = "adamw"\nlr_from = "mada"\n'
    (tmp_path / "file.toml").write_text(TWO_STAGES.partition("[contenders.fixed]")[0] + follower)
    folders = {stage: tmp_path / stage for stage in (TUNE, CONFIRM)}
    ending = run_stages(load(tmp_path / "file.toml"), folders, 1, lambda _: None, only=["follower"])
    assert ending.left_out == [
        "tune of follower: 0 of 2 runs of mada are over",
        "confirm of follower: 0 of 2 runs of mada are over",
    ]
    ending = run_stages(load(tmp_path / "file.toml"), folders, 1, lambda _: None)
    assert not ending.failed
    assert not ending.left_out
    best = next(each for each in load_stage(folders[TUNE]).contenders if each.label == "mada").best_lr()
    for stage, seeds in ((TUNE, [0]), (CONFIRM, [1, 2])):
        paths = sorted(folders[stage].glob("runs/follower-*"))
        assert [path.name for path in paths] == [f"follower-lr{best:g}-seed{seed}" for seed in seeds]
        assert {RunFolder(path).config().optimizer.lr for path in paths} == {best}


def test_a_training_resolves_what_is_written_and_nothing_else(tmp_path: Path, calls: Counter[str]) -> None:
    run = resolve(tiny_config("adamw", steps=2))
    calls.clear()
    train(run, tmp_path / "resolved", draw=False)
    assert calls == {IN_TRAINING: 1}
    train(tiny_config("adamw", steps=2), tmp_path / "written", draw=False)
    assert calls == {RESOLVED: 1, BUILT: 1, IN_TRAINING: 2}
    assert RunFolder(tmp_path / "resolved").config() == RunFolder(tmp_path / "written").config() == run


def test_a_resolved_run_has_no_none_and_is_stored_as_it_is_written() -> None:
    config = RunConfig(optimizer=OptimizerConfig("adamw"))
    run = resolve(config)
    assert None not in [run.final_lr, run.threads, run.device, run.optimizer.lr, run.optimizer.weight_decay]
    assert list(to_dict(run)) == list(to_dict(config))
    assert list(to_dict(run)["optimizer"]) == list(to_dict(config)["optimizer"])
    assert resolve(run) == run
    with pytest.raises(TypeError, match="final_lr"):
        ResolvedRun(optimizer=run.optimizer)  # type: ignore[call-arg]


def test_a_plan_refuses_what_cannot_be_trained() -> None:
    base = dataclasses.replace(tiny_config(device="nowhere"), optimizer=OptimizerConfig())
    with pytest.raises(InputError, match="device must be one that torch can use here, got 'nowhere'"):
        Plan(comparison(["adamw"], [1e-3], [0], base), {})


# What earlier versions stored.


@pytest.mark.parametrize(("name", "runs"), [("paths-digits", 45), ("betas-digits", 300)])
@pytest.mark.usefixtures("without_ray")
def test_a_sweep_of_an_earlier_version_goes_on(name: str, runs: int, tmp_path: Path) -> None:
    """Names and configurations of its runs are those that were stored, so none is trained again."""
    archive = REPOSITORY / "docs" / "results" / "2026-11-24-digits" / f"{name}.tar.gz"
    if not archive.exists():
        pytest.skip("the archives of results are in the repository alone")
    with tarfile.open(archive) as stored:
        stored.extractall(tmp_path, filter="data")
    stage = tmp_path / TUNE / "stage.json"
    described = json.loads(stage.read_text("utf-8"))
    kept: list[tuple[int, int]] = []
    ending = run_stages(
        load(REPOSITORY / "experiments" / f"{name}.toml"),
        {TUNE: tmp_path / TUNE},
        1,
        lambda run: pytest.fail(f"{run.name} was trained again"),
        only=list(described["contenders"]),  # the file has got more since
        on_kept=lambda _, over, left: kept.append((over, left)),
    )
    assert ending == Ending()
    assert [sum(counts) for counts in zip(*kept, strict=True)] == [runs, 0]
    assert json.loads(stage.read_text("utf-8"))["contenders"].items() >= described["contenders"].items()
