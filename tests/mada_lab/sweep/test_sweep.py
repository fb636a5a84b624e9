from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.report.results import betas_results, median_train_loss
from mada_lab.report.stage_files import write_stage_files
from mada_lab.report.tables import betas_table
from mada_lab.run.config import RunConfig, resolve
from mada_lab.run.folder import RunFolder
from mada_lab.run.result import Result
from mada_lab.run.stored import StoredRun
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.experiment import Experiment
from mada_lab.sweep.experiment_file import load
from mada_lab.sweep.run_stages import Ending, RunReport, run_stages
from mada_lab.sweep.stage_folder import CONFIRM, TUNE

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
SHAKESPEARE = EXPERIMENTS / "shakespeare.toml"
BASE = """
[base]
task = { kind = "language", layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }
steps = 10
eval_every = 5
threads = 1
"""
TINY = f"""
title = "Tiny"
{BASE}
[axes]
"optimizer.lr" = [1e-3, 1e-2]
seed = [0, 1]
[confirm]
steps = 12
seeds = [0, 1, 2]
[contenders.adamw]
name = "adamw"
axes = {{ "optimizer.lr" = [1e-3, 1e-2, 1e37] }}
[contenders.fixed]
name = "mada"
coefficients_from = "mada"
axes = {{ "optimizer.lr" = [1e-2] }}
[contenders.mada]
name = "mada"
options = {{ hyper_warmup = 2, hyper_lr = {{ rho = 0.5, beta1 = 0.05 }} }}
run = {{ task = {{ width = 32 }}, "task.heads" = 4 }}
[contenders.wild]
name = "adamw"
axes = {{ "optimizer.lr" = [1e37] }}
run = {{ steps = 40 }}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "file.toml").write_text(text)
    return folder / "file.toml"


def ignore(_: RunReport) -> None:
    pass


# Files.


def test_shakespeare() -> None:
    experiment = load(SHAKESPEARE, "/texts")
    labels = list(experiment.contenders)
    assert len(labels) == 17
    assert all(len(experiment.tune(label)) == 10 for label in labels)
    assert all(len(experiment.confirmed(label, 1e-2)) == 5 for label in labels)
    assert {config.optimizer.lr for config in experiment.tune("prodigy").values()} == {0.1, 0.3, 1, 3, 10}
    config = experiment.config("muon")
    assert (config.steps, config.eval_every, config.threads, config.final_lr) == (600, 100, 1, None)
    assert config.task == dataclasses.replace(RunConfig().task, data="/texts/tiny_shakespeare.txt")
    assert {config.steps for config in experiment.confirmed("muon", 1e-2).values()} == {2000}
    assert experiment.config("adamw β2 0.95").optimizer.betas == (0.9, 0.95)


def test_options_of_a_contender_that_are_fields(tmp_path: Path) -> None:
    options = "options = { betas = [0.1, 0.2], weight_decay = 3.0, eps = 1e-3 }"
    experiment = load(write(tmp_path, f'{BASE}[contenders.a]\nname = "adamw"\n{options}'))
    optimizer = experiment.config("a").optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.options) == ((0.1, 0.2), 3.0, {"eps": 1e-3})
    axes = '[axes]\n"optimizer.betas" = [[0.5, 0.9]]\n'
    path = write(tmp_path, f'{BASE}{axes}[contenders.a]\nname = "adamw"\n{options}')
    with pytest.raises(InputError, match="optimizer.betas of 'a' must be left out, for it is an axis"):
        load(path)


def test_other_values_for_fields_of_the_base(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, TINY), changes=["steps=3", "task.width=8", 'dtype="float64"'])
    base = experiment.base
    assert (base.steps, base.task.width, base.task.heads, base.dtype) == (3, 8, 2, "float64")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="set must be FIELD=VALUE as in TOML"):
        load(write(tmp_path, TINY), changes=["steps"])
    with pytest.raises(InputError, match="argument of task language must be one of .*, got 'length'"):
        load(write(tmp_path, TINY), changes=["task.length=3"])


def test_all_data_are_looked_up_in_their_root(tmp_path: Path) -> None:
    given = {"data": "a", "init": "gpt2", "wikitext": "b", "lambada": "/c"}
    fields = ", ".join(f'{name} = "{path}"' for name, path in given.items())
    text = f'[base]\ntask = {{ kind = "tokens", {fields} }}\n[contenders.mada]\nname = "mada"\n'
    task = load(write(tmp_path, text), "/data").base.task
    found = {name: getattr(task, name) for name in given}
    assert found == {"data": "/data/a", "init": "gpt2", "wikitext": "/data/b", "lambada": "/c"}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_of_the_repository_can_be_run(path: Path) -> None:
    experiment = load(path, "/data")
    for label in experiment.contenders:
        assert all(resolve(config) for config in experiment.tune(label).values())


def test_a_file_that_is_like_another(tmp_path: Path) -> None:
    write(tmp_path, TINY)
    changes = (
        'like = "file.toml"\n[base]\nsteps = 20\n[contenders.mada]\nname = "avgrad"\n[contenders.yogi]\nname = "yogi"\n'
    )
    (tmp_path / "other.toml").write_text(changes)
    one, other = load(tmp_path / "file.toml"), load(tmp_path / "other.toml")
    assert other.base == dataclasses.replace(one.base, steps=20)
    assert (other.title, other.axes, other.confirm) == (one.title, one.axes, one.confirm)
    assert list(other.contenders) == [*one.contenders, "yogi"]
    assert other.contenders["mada"] == dataclasses.replace(one.contenders["mada"], name="avgrad")


@pytest.mark.parametrize("like", ["file.toml", "none.toml", ".", "other.toml"])
def test_a_file_that_cannot_be_like_another(like: str, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('like = "file.toml"\n')
    with pytest.raises(InputError, match="like of .* must be the name of another file|must be an experiment in TOML"):
        load(write(tmp_path, f'like = "{like}"\n{TINY}'))


def test_the_file_in_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "experiments.md").read_text("utf-8")
    experiment = load(write(tmp_path, page.split("```toml\n")[1].split("```")[0]))
    assert list(experiment.contenders) == ["adamw", "mada ρ=0", "prodigy", "mada-fs"]
    assert experiment.config("prodigy").warmup == 0.1


def test_names_of_runs(tmp_path: Path) -> None:
    axes = '[axes]\nseed = [1]\n"optimizer.betas" = [[0.5, 0.9]]\n"optimizer.lr" = [0.1, 1]\n'
    path = write(tmp_path, f'{BASE}{axes}[contenders."Mada (ours): ρ"]\nname = "mada"\n')
    runs = load(path).tune("Mada (ours): ρ")
    assert list(runs) == ["Mada_ours_+_ρ-betas0.5,0.9-lr0.1-seed1", "Mada_ours_+_ρ-betas0.5,0.9-lr1-seed1"]
    config = runs["Mada_ours_+_ρ-betas0.5,0.9-lr0.1-seed1"]
    assert (config.optimizer.betas, config.optimizer.lr, config.seed) == ((0.5, 0.9), 0.1, 1)


def test_labels_with_commas(tmp_path: Path) -> None:
    label = "without β2, hyper_every = 10"
    experiment = load(write(tmp_path, f'{BASE}[contenders."{label}"]\nname = "mada"\n[contenders.a]\nname = "mada"'))
    assert experiment.labels([label, "a,b"]) == [label, "a", "b"]
    assert experiment.labels([]) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("title =", "titel =", "key of file must be one of title, base, .*, got 'titel'"),
        ("[base]", "[base", "file must be an experiment in TOML"),
        ('kind = "language"', 'kind = "music"', "task must be one of language.*, got 'music'"),
        ("layers = 1", "layer = 1", "argument of task language must be one of .*, got 'layer'"),
        ("steps = 10", "stops = 10", "field must be one of a run's: task, .*, got 'stops'"),
        ("steps = 10", "steps = -1", "steps must be a positive integer, got -1"),
        ("seed = [0, 1]", "seed = [0, 0]", "seed must be a list that is not empty and repeats nothing"),
        ("seed = [0, 1]", "seed = 0", "seed must be a list that is not empty and repeats nothing, got 0"),
        ("seed = [0, 1]", '"optimizer.rl" = [1]', "axis of 'adamw' must be one of optimizer.lr, .*'optimizer.rl'"),
        (
            "seed = [0, 1]",
            "clip = [0, 1]",
            "axis of 'adamw' must be one of .*seed; use contenders for others, got 'clip'",
        ),
        ("steps = 10", "optimizer = { betas = 0.9 }", "optimizer.betas must be two numbers, got 0.9"),
        ("seeds = [0, 1, 2]", "", "confirm must be a table with seeds"),
        ("seeds = [0, 1, 2]", "seeds = []", "confirm.seeds must be a list that is not empty"),
        ("hyper_warmup = 2,", "lr = 1.0,", "options of mada must not have lr, got 1.0: .* the axis optimizer.lr"),
        ("hyper_warmup = 2,", "betas = 0.1,", "betas must be two numbers, got 0.1"),
        ("run = { steps = 40 }", "run = { seed = 4 }", "seed of 'wild' must be left out, for it is an axis"),
        ("run = { steps = 40 }", "run = { optimizer = { lr = 1.0 } }", "optimizer.lr of 'wild' must be left out"),
        ("steps = 12", '"optimizer.lr" = 1.0', "optimizer.lr of 'confirm' must be left out"),
        ("steps = 10", "optimizer = { lr = 1.0 }", "optimizer.lr of 'base' must be left out"),
        ("hyper_warmup = 2,", "hyper_warmpu = 2,", "hyper_warmpu"),
        ('[contenders.mada]\nname = "mada"', "[contenders.mada]", "contenders.mada must be a table with a name"),
        ('[contenders.mada]\nname = "mada"', '[contenders.mada]\nname = "adamx"', "got 'adamx'"),
        (
            'coefficients_from = "mada"',
            'lr_from = "adamw"',
            "axes of 'fixed' must be without what lr_from gives, got 'optimizer.lr'",
        ),
        ('coefficients_from = "mada"', 'lr_from = "adam"', "lr_from of 'fixed' must be one of 'adamw', 'mada', 'wild'"),
        (
            'coefficients_from = "mada"',
            'coefficients_from = "Mada"',
            "coefficients_from of 'fixed' must be one of 'adam",
        ),
        ('coefficients_from = "mada"', 'coefficients_from = "adamw"', "a contender whose optimizer has coefficients"),
        ("[contenders.wild]", '[contenders."adamw!"]', "runs must be told apart .*, got 'adamw-lr1e.37-seed0'"),
        ("val_windows = 8", 'val_windows = 8, data = "nowhere.txt"', "nowhere.txt', which does not exist"),
        ('"task.heads" = 4', '"task.heads" = 5', "width must be a multiple of heads"),
    ],
)
def test_errors_before_anything_is_written(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in TINY
    text = TINY.replace(before, after, 1)
    with pytest.raises(InputError, match=message):
        run_stages(load(write(tmp_path, text)), folders(tmp_path), 1, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["file.toml"]


# Two stages.


def folders(out: Path) -> dict[str, Path]:
    return {stage: out / stage for stage in (TUNE, CONFIRM)}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return load(write(tmp_path_factory.mktemp("file"), TINY))


@pytest.fixture(scope="module")
def out(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    seen: list[RunReport] = []
    ending = run_stages(experiment, folders(out), 2, seen.append)
    assert ending == Ending(left_out=["confirm of wild: wild has a diverged run at each learning rate"])
    # In the first stage 6 + 2 + 4 + 2, in the second 3 each but for the wild one.
    assert [run.done for run in seen] == list(range(1, 24))
    assert seen[-1].total == 23
    assert seen[-1].seconds_left == 0
    assert all(run.seconds_left > 0 for run in seen[:-1])
    return out


def stored(folder: Path) -> dict[str, tuple[RunConfig, Result]]:
    return {
        path.parent.name: (RunFolder(path.parent).config(), Result(**json.loads(path.read_text())))
        for path in folder.glob("runs/*/result.json")
    }


def test_the_second_stage_is_at_the_best_learning_rate(out: Path) -> None:
    tuned, confirmed = stored(out / TUNE), stored(out / CONFIRM)

    def mean(lr: str) -> float:
        return statistics.fmean(tuned[f"adamw-lr{lr}-seed{seed}"][1].val_loss or 0.0 for seed in (0, 1))

    assert tuned["adamw-lr1e+37-seed0"][1].status == "diverged"
    best = min(("0.001", "0.01"), key=mean)
    assert {name for name in confirmed if name.startswith("adamw")} == {f"adamw-lr{best}-seed{s}" for s in (0, 1, 2)}
    assert {config.steps for config, _ in confirmed.values()} == {12}
    assert {config.steps for name, (config, _) in tuned.items() if not name.startswith("wild")} == {10}
    assert {config.task.width for name, (config, _) in confirmed.items() if name.startswith("mada")} == {32}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("stage", "seeds"), [(TUNE, 2), (CONFIRM, 3)])
def test_fixed_coefficients_are_the_means_of_the_learned_ones(out: Path, stage: str, seeds: int) -> None:
    runs = stored(out / stage)
    write_stage_files(out / stage)
    entries = json.loads((out / stage / "results.json").read_text())["results"]
    best = next(f"lr{entry['best_lr']:g}" for entry in entries if entry["optimizer"] == "mada")
    finals = [runs[f"mada-{best}-seed{seed}"][1].coefficients for seed in range(seeds)]
    assert len({final["rho"] for final in finals}) == seeds
    means = {name: statistics.fmean(final[name] for final in finals) for name in finals[0]}
    for seed in range(seeds):
        config, result = runs[f"fixed-lr0.01-seed{seed}-from-{best}-x{seeds}"]
        assert config.optimizer.betas == (means["beta1"], means["beta2"])
        assert config.optimizer.options["hyper_lr"] == 0
        # The optimizer holds them in float32.
        assert result.coefficients == pytest.approx(means, rel=1e-6)


@pytest.mark.usefixtures("without_ray")
def test_each_optimizer_has_its_own_schedule(experiment: Experiment, tmp_path: Path) -> None:
    contenders = {
        name: dataclasses.replace(experiment.contenders["adamw"], name=name) for name in ("adamw", "schedulefree")
    }
    both = dataclasses.replace(experiment, contenders=contenders)
    assert [config.final_lr for name in contenders for config in both.tune(name).values()] == [None] * 12


@pytest.mark.usefixtures("without_ray")
def test_again_trains_nothing_and_more_seeds_are_added(experiment: Experiment, out: Path) -> None:
    again = run_stages(experiment, folders(out), 2, lambda _: pytest.fail("trained again"))
    assert not again.failed
    more = dataclasses.replace(experiment, axes={**experiment.axes, "seed": [0, 1, 2]})
    seen: list[str] = []
    run_stages(more, folders(out), 2, lambda run: seen.append(run.name), stages=[TUNE], only=["wild"])
    assert seen == ["wild-lr1e+37-seed2"]
    ending = run_stages(more, folders(out), 2, ignore, stages=[CONFIRM], only=["wild"])
    assert ending.left_out == ["confirm of wild: wild has a diverged run at each learning rate"]


@pytest.mark.usefixtures("without_ray")
def test_a_stage_stored_before_a_field_existed_goes_on(experiment: Experiment, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "older")
    for stage in folders(tmp_path / "older").values():
        described = json.loads((stage / "stage.json").read_text())
        del described["base"]["task"]["dropout"], described["base"]["hyper_unclipped"]
        (stage / "stage.json").write_text(json.dumps(described))
    ending = run_stages(experiment, folders(tmp_path / "older"), 2, lambda _: pytest.fail("trained again"))
    assert not ending.failed


def change_contender(experiment: Experiment) -> Experiment:
    contender = dataclasses.replace(experiment.contenders["adamw"], betas=(0.5, 0.9))
    return dataclasses.replace(experiment, contenders={**experiment.contenders, "adamw": contender})


def change_base(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, base=dataclasses.replace(experiment.base, clip=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_contender, r"optimizer.betas: \[0.5, 0.9\], there \[0.9, 0.99\]"),
        (change_base, "clip: 2.0, there 1.0"),
    ],
)
def test_a_changed_file_is_refused(
    change: Callable[[Experiment], Experiment], message: str, experiment: Experiment, out: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_stages(change(experiment), folders(out), 2, ignore)


def test_wrong_choices(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only must be one of 'adamw', .*, got 'adam'"):
        run_stages(experiment, folders(tmp_path), 1, ignore, only=["adam"])
    with pytest.raises(InputError, match="confirm needs tune: 0 of 6 runs of adamw are over"):
        run_stages(experiment, folders(tmp_path), 1, ignore, stages=[CONFIRM])
    with pytest.raises(InputError, match=r"stage must be tune for an experiment without \[confirm\], got 'confirm'"):
        run_stages(dataclasses.replace(experiment, confirm=None), folders(tmp_path), 1, ignore, stages=[CONFIRM])
    assert not list(tmp_path.iterdir())


BETAS = f"""
threshold = 10.0
{BASE}
[axes]
"optimizer.betas" = [[0.1, 0.5], [0.1, 0.9], [0.9, 0.5], [0.9, 0.9]]
[contenders.adamw]
name = "adamw"
[contenders.hyperadam]
name = "hyperadam"
"""


@pytest.mark.usefixtures("without_ray")
def test_command_on_betas_and_a_run_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(write(tmp_path, BETAS)), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "8/8" in printed
    tune = tmp_path / "out" / TUNE
    assert "train loss < 10 |" in (tune / "table.md").read_text()
    assert {path.name for path in tune.glob("betas.*")} == {"betas.png", "betas.svg"}
    found = json.loads((tune / "results.json").read_text())["betas"]
    assert [(entry["optimizer"], entry["runs"], entry["share"]) for entry in found] == [
        ("adamw", 4, 1.0),
        ("hyperadam", 4, 1.0),
    ]
    name = "adamw-betas0.1,0.5"
    assert found[0]["starts"][0]["val_loss"] == stored(tune)[name][1].val_loss
    # Something else has come into the folder of a run: it is named, and the others go on.
    for file in (tune / "runs" / name).glob("*.*"):
        file.unlink()
    (tune / "runs" / name / "thesis.tex").touch()
    (tune / "runs" / "adamw-betas0.9,0.9" / "result.json").unlink()
    assert main(command) == 1
    printed, error = capsys.readouterr()
    assert f"mada: {name} failed: out must be a new or empty folder" in error
    assert "adamw-betas0.9,0.9  finished" in printed
    assert "INCOMPLETE: 7 of 8" in printed


# Starts of the betas.


def run(betas: tuple[float, float], seed: int, train: float | None, val: float | None, lr: float = 0.1) -> StoredRun:
    result = Result("finished", 1, train, val, val, 0.0, 0.0, {}, 0)
    return StoredRun(lr, betas, seed, result, [])


def test_table_of_betas() -> None:
    one, two = (0.1, 0.9), (0.5, 0.9)
    runs = [run(one, 0, 1.0, 2.0), run(one, 1, 3.0, 4.0), run(two, 0, 2.0, 5.0), run(two, 1, None, None)]
    other = [
        run(one, 0, 9.0, 9.0, 0.2),
        run(one, 1, 9.0, 9.0, 0.2),
        run(two, 0, 9.0, 9.0, 0.2),
        run(two, 1, 9.0, 9.0, 0.2),
    ]
    contender = ContenderRuns("adamw", runs + other)
    found = betas_results([contender], 2.5)
    assert found[0]["starts"] == [
        {"betas": [0.1, 0.9], "train_loss": 2.0, "val_loss": 3.0},
        {"betas": [0.5, 0.9], "train_loss": None, "val_loss": None},
    ]
    table = betas_table(found, 2.5)
    assert table[1] == ["adamw", "0.1 †", "4", "50.0%", "2.5000", "diverged", "4.5000", "diverged", "-"]
    assert median_train_loss([contender]) == 9.0


def test_starts_of_the_betas_are_compared_one_by_one() -> None:
    starts = [(0.1, 0.9), (0.5, 0.9), (0.9, 0.9), (0.9, 0.5)]
    losses = {"adamw": [2.0, 3.0, None, None], "mada": [1.9, 3.1, 9.0, None]}
    contenders = [
        ContenderRuns(label, [run(start, 0, loss, loss) for start, loss in zip(starts, column, strict=True)])
        for label, column in losses.items()
    ]
    # One that was not trained everywhere is compared where it was.
    contenders.append(ContenderRuns("adan", [run(starts[1], 0, 2.0, 2.0), run((0.7, 0.7), 0, 2.0, 2.0)]))
    found = betas_results(contenders, 2.5)
    assert [row[-1] for row in betas_table(found, 2.5)] == ["below adamw's", "-", "2 of 4", "1 of 1"]
    found = betas_results(contenders, 2.5, "mada")
    assert [row[-1] for row in betas_table(found, 2.5, "mada")] == ["below mada's", "1 of 4", "-", "1 of 1"]
    assert betas_table(betas_results(contenders[1:], 2.5), 2.5)[1][-1] == "-"
