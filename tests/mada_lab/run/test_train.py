from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import assert_same_run, tiny_config, without_times

from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.report.stage_report import StageReport
from mada_lab.run.config import RunConfig, from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import PATIENCE, StepReport, train
from mada_lab.sweep.changes import changed
from mada_lab.sweep.stage_folder import load_run_alone
from mada_lab.tasks.language import LanguageTask

KILL_AT = 17


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, by optimizer."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("mada", "adamw")}
    for name, folder in folders.items():
        train(tiny_config(name), folder)
    return folders


def test_what_a_run_leaves_behind(whole: dict[str, Path]) -> None:
    folder = whole["mada"]
    names = {path.name for path in folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "tensorboard", "figure.png", "figure.svg", "result.json"}
    assert names - {"lock"} == files
    stored = json.loads((folder / "config.json").read_text())
    assert {"python", "torch", "transformers", "mada_optim"} == stored["versions"].keys()
    assert len(stored["data"]["sha256"]) == 64
    assert None not in [stored["config"][name] for name in ("threads", "device")]
    assert stored["config"]["optimizer"]["betas"] == [0.9, 0.99]

    lines = RunFolder(folder).metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 10, 20, 30]
    first, last = (next(line for line in order if "loss" in line) for order in (lines, lines[::-1]))
    assert first["coefficients"]["rho"] == 0.5
    assert last["coefficients"] != first["coefficients"]
    assert last["lr"] == pytest.approx(1e-3)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["val_loss"] == lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert any(path.name.startswith("events") for path in (folder / "tensorboard").iterdir())


def test_same_config_same_run(whole: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config("adamw"), tmp_path / "again", draw=False)
    assert_same_run(whole["adamw"], tmp_path / "again")


def test_another_seed_is_another_run(whole: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config("adamw", seed=1), tmp_path / "other", draw=False)
    assert without_times(whole["adamw"]) != without_times(tmp_path / "other")


def test_dropout_is_drawn_again_after_a_resume_and_not_in_validation(whole: dict[str, Path], tmp_path: Path) -> None:
    config = changed(tiny_config("adamw"), {"task.dropout": 0.5})
    train(config, tmp_path / "whole", draw=False)
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "stopped", on_step=lambda report: 1 // (17 - report.step))  # type: ignore[arg-type,return-value]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    train(config, tmp_path / "stopped", resume=True, draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    # The same weights at first: the same validation, but not the same loss of a step.
    without, with_dropout = (without_times(folder) for folder in (whole["adamw"], tmp_path / "whole"))
    assert without[0] == with_dropout[0]
    assert without[1]["loss"] != with_dropout[1]["loss"]


def train_until_killed(folder: Path) -> None:
    """In a process of its own, which kills itself in the middle of a run, as kill -9 would."""

    def on_step(report: StepReport) -> None:
        if report.step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny_config(), folder, on_step=on_step)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_killed_run_goes_on_bit_for_bit(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    assert forked.run(train_until_killed, folder).returncode == -signal.SIGKILL
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 10
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "lo')
    result = train(tiny_config(), folder, resume=True)
    assert result.status == "finished"
    assert_same_run(whole["mada"], folder)


def test_killed_before_the_first_checkpoint(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(tiny_config("adamw"), folder, on_step=lambda report: 1 // (5 - report.step))  # type: ignore[arg-type,return-value]
    assert not (folder / "checkpoint.pt").exists()
    train(tiny_config("adamw"), folder, resume=True)
    assert_same_run(whole["adamw"], folder)
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 31))
    assert [event.step for event in events.Scalars("val_loss")] == [0, 10, 20, 30]


def test_ctrl_c_before_the_first_step(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = LanguageTask.validate
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTask, "validate", lambda *a: (os.kill(os.getpid(), signal.SIGINT), validate(*a))[1])
        assert train(tiny_config(), tmp_path / "run").step == 0
    train(tiny_config(), tmp_path / "run", resume=True)
    assert_same_run(whole["mada"], tmp_path / "run")


def test_a_folder_in_which_another_process_trains(whole: dict[str, Path], tmp_path: Path) -> None:
    def resume(report: StepReport) -> None:
        if report.step in (5, 15):
            with pytest.raises(InputError, match=f"another process is writing into {tmp_path / 'run'}; wait"):
                train(tiny_config(), tmp_path / "run", resume=True)

    train(tiny_config(), tmp_path / "run", on_step=resume)
    assert_same_run(whole["mada"], tmp_path / "run")


def test_ctrl_c_keeps_all_steps(whole: dict[str, Path], tmp_path: Path) -> None:
    def press(report: StepReport) -> None:
        if report.step == 13:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = train(tiny_config(), tmp_path / "run", on_step=press)
    assert (result.status, result.step) == ("interrupted", 13)
    assert signal.getsignal(signal.SIGINT) is before
    steps: list[int] = []
    train(tiny_config(), tmp_path / "run", resume=True, on_step=lambda report: steps.append(report.step))
    assert steps[0] == 14
    assert_same_run(whole["mada"], tmp_path / "run")


def test_finished_run_does_nothing(whole: dict[str, Path]) -> None:
    def never(report: StepReport) -> None:
        raise AssertionError(report)

    before = (whole["mada"] / "metrics.jsonl").stat().st_mtime_ns
    assert train(tiny_config(), whole["mada"], resume=True, on_step=never).status == "finished"
    assert (whole["mada"] / "metrics.jsonl").stat().st_mtime_ns == before


def _interrupted(folder: Path, **changes: Any) -> RunConfig:
    config = tiny_config("adamw", **changes)
    with pytest.raises(ZeroDivisionError):
        train(config, folder, on_step=lambda report: 1 // (11 - report.step))  # type: ignore[arg-type,return-value]
    return config


def test_corrupt_checkpoint(tmp_path: Path) -> None:
    config = _interrupted(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    weights = content.index(b"/data/0") + 4096  # among numbers, which torch.load would take as they are
    flipped = content[:weights] + bytes(255 - byte for byte in content[weights : weights + 8]) + content[weights + 8 :]
    for broken in (content[: len(content) // 2], b"", b"not a checkpoint", flipped):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"checkpoint.pt cannot be read .* delete it to start this run again"):
            train(config, tmp_path / "run", resume=True)


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    config = _interrupted(tmp_path / "run")
    _interrupted(tmp_path / "other", seed=3)
    (tmp_path / "other" / "checkpoint.pt").replace(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match=r"does not fit config.json beside it"):
        train(config, tmp_path / "run", resume=True)


def test_resume_with_another_config_or_other_data(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("To be, or not to be. " * 100)
    config = tiny_config("adamw")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=str(text)))
    train(config, tmp_path / "run", draw=False)
    with pytest.raises(InputError, match="steps: 40, there 30"):
        train(dataclasses.replace(config, steps=40), tmp_path / "run", resume=True)
    text.write_text("To be, or not to bet. " * 100)
    with pytest.raises(InputError, match="sha256"):
        train(config, tmp_path / "run", resume=True)


def test_folder_in_use(whole: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="new or empty folder"):
        train(tiny_config(), whole["mada"])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OptimizerConfig("adamx"), "optimizer must be one of adam, adamw, .* got 'adamx'"),
        (OptimizerConfig("mada", options={"rho": 2.0}), "optimizer mada: .*rho"),
        (OptimizerConfig("mada", options={"hyper_lr": {"zeta": 1.0}}), "optimizer mada: .*zeta"),
        (OptimizerConfig("adamw", options={"rho": 1.0}), "optimizer adamw: .*rho"),
        (OptimizerConfig("adamw", betas=(1.5, 0.9)), "optimizer adamw: .*1.5"),
    ],
)
def test_bad_optimizers_leave_no_folder(optimizer: OptimizerConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(tiny_config(), optimizer=optimizer), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("warmup", 1.5), ("clip", -1.0), ("seed", -1), ("threads", 0), ("dtype", "int8"), ("eval_every", 0)],
)
def test_bad_config(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"got {value!r}")):
        tiny_config(**{name: value})


def test_bad_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device must be one that torch can use here, got 'warp'"):
        train(tiny_config(device="warp"), tmp_path / "run")


def test_config_survives_json() -> None:
    config = dataclasses.replace(
        tiny_config(), optimizer=OptimizerConfig(betas=(0.3, 0.6), options={"hyper_lr": {"rho": 0.1}, "c": 0.0})
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(InputError, match="not the configuration of a run"):
        from_dict({**to_dict(config), "stepz": 3})


def test_one_bad_batch_is_skipped_and_many_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LanguageTask.loss
    bad = {5}

    def spoilt(self: LanguageTask, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = loss(self, model, batch)
        spoil = model.training and any(torch.equal(batch[0], self.batch(0, step)[0]) for step in bad)
        return value * float("nan") if spoil else value

    monkeypatch.setattr(LanguageTask, "loss", spoilt)
    result = train(tiny_config(), tmp_path / "one", draw=False)
    assert result.status == "finished"
    assert result.val_loss is not None
    assert [line["step"] for line in RunFolder(tmp_path / "one").metrics() if line.get("loss", 0) is None] == [5]
    assert result.skipped_steps == 1
    report = StageReport(load_run_alone(tmp_path / "one"))
    assert report.problems() == ["mada: one left out 1 step whose loss or gradient was not finite"]

    bad = set(range(12, 31))
    result = train(tiny_config(), tmp_path / "many")
    assert (result.status, result.step, result.val_loss) == ("diverged", 11 + PATIENCE, None)
    assert json.loads((tmp_path / "many" / "result.json").read_text())["val_loss"] is None
    weights = RunFolder(tmp_path / "many").load_checkpoint()
    assert weights is not None
    assert all(tensor.isfinite().all() for tensor in weights["model"].values())


@pytest.mark.parametrize("name", ["adam", "adan", "amsgrad", "avgrad", "hyperadam", "lion", "yogi"])
def test_every_optimizer_trains(name: str, tmp_path: Path) -> None:
    result = train(tiny_config(name, steps=4), tmp_path / name, draw=False)
    assert result.status == "finished"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    assert train(tiny_config(steps=4, dtype=dtype), tmp_path / "run", draw=False).status == "finished"
