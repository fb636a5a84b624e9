"""Trainings that begin with the weights of an earlier run: the same model, its vocabulary, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same, assert_same_run, tiny_config
from transformers import GPT2LMHeadModel

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.optimizers.registry import ENTRIES
from mada_lab.report.stage_files import write_stage_files
from mada_lab.run.config import RunConfig, from_dict, resolve, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.sweep.experiment_file import load
from mada_lab.sweep.run_stages import run_stages
from mada_lab.sweep.stage_folder import TUNE
from mada_lab.tasks.language import LanguageConfig
from mada_lab.tasks.vision import VisionConfig

SIZES = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--val-windows", "8"]


def changed_task(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on Python's language reference."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    train(tiny_config("adamw", steps=10), folder, draw=False)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has far fewer characters than the language reference."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("".join(f"To be, or not to be: {number}\n" for number in range(200)))
    return path


def later(earlier: Path, text: Path, name: str = "mada", **changes: Any) -> RunConfig:
    return changed_task(tiny_config(name, **changes), data=str(text), init=str(earlier))


def stored(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = RunFolder(folder).load_checkpoint()
    assert checkpoint is not None
    return dict(checkpoint["model"])


@pytest.fixture(scope="module")
def whole(earlier: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("later") / "run"
    train(later(earlier, text), folder, draw=False)
    return folder


def test_a_run_begins_where_the_earlier_one_ended(earlier: Path, text: Path, whole: Path) -> None:
    """Its first validation is that of the stored weights, computed from nothing but the files of the earlier run."""
    codes = {character: code for code, character in enumerate(stored(earlier)["data"]["vocabulary"])}
    tokens = torch.tensor([codes[character] for character in text.read_text()])
    validation = tokens[int(0.9 * len(tokens)) :]
    model = GPT2LMHeadModel(from_dict(stored(earlier)["config"]).task.build().model(5).config).eval()
    model.load_state_dict(weights(earlier))
    losses = []
    for start in torch.linspace(0, len(validation) - 17, 8).long():
        logits = model(input_ids=validation[None, start : start + 16]).logits[0]
        losses.append(F.cross_entropy(logits, validation[start + 1 : start + 17]).item())
    first, *_, last = (line for line in RunFolder(whole).metrics() if "val_loss" in line)
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert last["val_loss"] < first["val_loss"] - 0.1


def test_the_vocabulary_is_that_of_the_earlier_run(earlier: Path, text: Path, whole: Path) -> None:
    data = stored(whole)["data"]
    assert data["vocabulary"] == stored(earlier)["data"]["vocabulary"]
    assert set(data["vocabulary"]) > set(text.read_text())
    assert data["init"]["source"] == earlier.name
    assert stored(earlier)["data"]["init"] is None


def test_weights_do_not_depend_on_the_seed_but_the_data_do(earlier: Path, text: Path) -> None:
    task = later(earlier, text).task.build()
    for seed in (0, 1):
        assert_same(dict(task.model(seed).state_dict()), weights(earlier))
    assert not torch.equal(task.batch(0, 1)[0], task.batch(1, 1)[0])


def test_resumed_bit_for_bit(earlier: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    config = later(earlier, text)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", on_step=lambda report: 1 // (17 - report.step))  # type: ignore[arg-type,return-value]
    assert train(config, tmp_path / "run", resume=True, draw=False).status == "finished"
    assert_same_run(whole, tmp_path / "run")


def test_resumed_only_with_the_same_weights(earlier: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "earlier")
    config = later(tmp_path / "earlier", text)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", on_step=lambda report: 1 // (11 - report.step))  # type: ignore[arg-type,return-value]
    folder = RunFolder(tmp_path / "earlier")
    state = folder.load_checkpoint()
    assert state is not None
    folder.save_checkpoint(state | {"step": 11})  # of the file, but not of the weights
    assert train(config, tmp_path / "run", resume=True, draw=False).status == "finished"
    state["model"]["transformer.ln_f.bias"][0] += 1e-3
    folder.save_checkpoint(state)
    with pytest.raises(InputError, match="is a run of another configuration .init.sha256: "):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - {"schedulefree"}))
def test_a_run_of_any_optimizer_is_one_to_begin_with(name: str, text: Path, tmp_path: Path) -> None:
    train(tiny_config(name, steps=1), tmp_path / "earlier", draw=False)
    assert_same(
        dict(later(tmp_path / "earlier", text).task.build().model(0).state_dict()), weights(tmp_path / "earlier")
    )


def test_an_interrupted_run_and_one_in_bfloat16(text: Path, tmp_path: Path) -> None:
    config = tiny_config("adamw", dtype="bfloat16")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "half", on_step=lambda report: 1 // (13 - report.step))  # type: ignore[arg-type,return-value]
    model = later(tmp_path / "half", text).task.build().model(0)
    assert_same(dict(model.state_dict()), {name: value.float() for name, value in weights(tmp_path / "half").items()})


def test_a_shorter_context_and_back(earlier: Path, text: Path, tmp_path: Path) -> None:
    short = changed_task(later(earlier, text, "adamw", steps=4), context=8)
    train(short, tmp_path / "short", draw=False)
    assert short.task.build().batch(0, 1)[0].shape == (4, 8)
    assert later(tmp_path / "short", text).task.build().batch(0, 1)[0].shape == (4, 16)


def test_characters_of_another_text(text: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.txt"
    strange.write_text("One € is 1.08 $, or 0.83 £; ∀ ε > 0. " * 30)
    config = changed_task(tiny_config("adamw", steps=4), data=str(text), characters_of=str(strange))
    train(config, tmp_path / "run", draw=False)
    known = "".join(sorted(set(text.read_text() + strange.read_text())))
    assert stored(tmp_path / "run")["data"]["vocabulary"] == known
    assert train(later(tmp_path / "run", strange, steps=4), tmp_path / "later", draw=False).status == "finished"
    with pytest.raises(InputError, match="characters_of must be the path of a text file, got 'nowhere'"):
        LanguageConfig(characters_of="nowhere").build()
    with pytest.raises(InputError, match="characters_of must be left out with init, .*, got 'x'"):
        LanguageConfig(init="run", characters_of="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, "layers must be 1, as in init=.*run, got 2"),
        ({"heads": 4}, "heads must be 2, as in init=.*run, got 4"),
        ({"width": 32}, "width must be 16, as in init=.*run, got 32"),
        ({"context": 17}, "context must be at most 16, as in init=.*run, got 17"),
        (
            {"init": "nowhere"},
            r"init must be the folder of a run of the task language \(there is no .*\), got 'nowhere'",
        ),
    ],
)
def test_other_models_leave_no_folder(
    changes: dict[str, Any], message: str, earlier: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(changed_task(later(earlier, text), **changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_characters_that_are_not_known(earlier: Path, tmp_path: Path) -> None:
    path = tmp_path / "euro.txt"
    path.write_text("5 € and 3 ¥ " * 100)
    message = r"data must be a text of characters that init=.*run knows, .* \(it lacks '¥€'\), got '.*euro.txt'"
    with pytest.raises(InputError, match=message):
        train(later(earlier, path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil_kind(folder: Path) -> None:
    shutil.rmtree(folder)
    config = dataclasses.replace(tiny_config("adamw", steps=2), task=VisionConfig(width=2, batch=4))
    train(config, folder, draw=False)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def spoil_vocabulary(folder: Path) -> None:
    values = stored(folder)
    values["data"]["vocabulary"] = 103
    (folder / "config.json").write_text(json.dumps(values))


def spoil_checkpoint(folder: Path) -> None:
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])


def remove_checkpoint(folder: Path) -> None:
    (folder / "checkpoint.pt").unlink()


def diverge(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "diverged"}))


def schedule_free(folder: Path) -> None:
    shutil.rmtree(folder)
    train(tiny_config("schedulefree", steps=2), folder, draw=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_kind, "it is of the task vision"),
        (spoil_config, "there is no config.json of a run"),
        (spoil_vocabulary, "a run that has stored its vocabulary"),
        (spoil_checkpoint, "its checkpoint.pt cannot be read: "),
        (remove_checkpoint, "there is no checkpoint.pt yet"),
        (diverge, "it diverged"),
        (schedule_free, "it is schedule-free, and stores other weights than it validates"),
    ],
)
def test_runs_that_nothing_can_begin_with(spoil: Any, message: str, earlier: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "earlier")
    spoil(tmp_path / "earlier")
    with pytest.raises(InputError, match=f"init must be .*{message}.*, got '.*earlier'"):
        train(later(tmp_path / "earlier", text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_survives_json(earlier: Path, text: Path) -> None:
    config = later(earlier, text)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One run after the other by relative paths; the second is resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("It was the best of times. " * 100)
    (tmp_path / "play.txt").write_text("To be, or not to be: $3. " * 100)
    common = [*SIZES, "--optimizer", "adamw", "--threads", "1", "--quiet", "--steps", "4", "--device", "cpu"]
    first = ["--data", "novel.txt", "--characters-of", "play.txt", "--out", "runs/novel"]
    assert main(["train", *common, *first]) == 0
    second = ["--data", "play.txt", "--init", "runs/novel", "--out", "runs/play"]
    assert main(["train", *common, *second]) == 0
    assert stored(tmp_path / "runs" / "play")["config"]["task"]["init"] == str(tmp_path / "runs" / "novel")
    (tmp_path / "runs" / "play" / "result.json").unlink()
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "runs" / "play"), "--quiet"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", *common, "--init", "runs/play", "--out", "out"]) == 2
    assert "data must be a text of characters that init=" in capsys.readouterr().err


SWEEP = """
[base]
task = {{ data = "other.txt", init = "{}", layers = 1, heads = 2, width = 16, context = 16, batch = 4 }}
steps = 4
threads = 1
[axes]
"optimizer.lr" = [1e-3]
[contenders.adamw]
name = "adamw"
"""


@pytest.mark.usefixtures("without_ray")
def test_sweep(earlier: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are looked up in the root of the data, an earlier run where the command is given."""
    monkeypatch.chdir(earlier.parent)
    (tmp_path / "file.toml").write_text(SWEEP.format("run"))
    experiment = load(tmp_path / "file.toml", text.parent)
    config = resolve(experiment.config("adamw"))
    assert (config.task.data, config.task.init) == (str(text), str(earlier))  # type: ignore[attr-defined]
    assert not run_stages(experiment, {TUNE: tmp_path / "out"}, 1, lambda _: None).failed
    write_stage_files(tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "other.txt after run; layers 1" in table
    assert str(earlier.parent) not in table
    (tmp_path / "file.toml").write_text(SWEEP.format("nowhere"))
    with pytest.raises(InputError, match="init must be the folder of a run .*, got 'nowhere'"):
        run_stages(load(tmp_path / "file.toml", text.parent), {TUNE: tmp_path / "none"}, 1, lambda _: None)
    assert not (tmp_path / "none").exists()
