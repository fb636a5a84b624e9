"""What goes wrong on real machines: kills, full disks, bad batches, spikes, bad starts."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from tiny import assert_same_run, tiny_config

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.files import write_json
from mada_lab.run.config import ResolvedRun
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import StepReport, train
from mada_lab.tasks.language import LanguageTask

REAL_SAVE = torch.save
KILLS = int(os.environ.get("MADA_SOAK_KILLS", "20"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_model(tmp_path: Path) -> None:
    """MADA_SOAK_KILLS says how often."""
    from soak import soak, soak_config

    done = forked.run(soak, tmp_path / "killed", KILLS, 0, timeout=None)
    assert done.stdout == f"{KILLS} kills, then exit code 0\n", done.stderr
    train(soak_config(KILLS), tmp_path / "whole", draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# Full disks.


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_save(state: Any, file: Any) -> None:
    REAL_SAVE(state, written := io.BytesIO())
    file.write(written.getvalue()[: written.tell() // 2])
    file.flush()
    no_space()


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [(torch, "save", half_a_save), (os, "fsync", no_space), (os, "replace", no_space)],
    ids=["writing", "syncing", "replacing"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    module: Any, name: str, failure: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    state = {"step": 1, "model": {"weight": torch.ones(1000)}, "optimizer": {}}
    folder.save_checkpoint(state)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        with pytest.raises(OSError, match="No space left"):
            folder.save_checkpoint(state | {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    found = folder.load_checkpoint()
    assert found is not None
    assert found["step"] == 1


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_result_that_cannot_be_written_leaves_no_half_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "result.json", {"status": "finished"})
    assert not list(tmp_path.iterdir())


def train_on_a_full_disk(folder: Path) -> None:
    """From step 15 on, no file may become larger than half a checkpoint: the system refuses to write the next one."""
    import resource

    def on_step(report: StepReport) -> None:
        if report.step == 15:
            size = (folder / "checkpoint.pt").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    try:
        train(tiny_config(), folder, on_step=on_step)
    except InputError as error:
        sys.exit(str(error))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes on this system")
def test_a_full_disk_ends_the_run_with_a_message_and_it_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = forked.run(train_on_a_full_disk, folder)
    assert done.returncode == 1
    assert f"{folder} cannot be written at step 20: File too large" in done.stderr.splitlines()[-1]
    assert not list(folder.glob("*.tmp"))
    checkpoint = RunFolder(folder).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint["step"] == 10
    train(tiny_config(), folder, resume=True, draw=False)
    train(tiny_config(), tmp_path / "whole", draw=False)
    assert_same_run(tmp_path / "whole", folder)


def test_a_kill_while_the_folder_is_made_leaves_it_usable(tmp_path: Path) -> None:
    (tmp_path / "config.json.tmp").write_text('{"config"')
    assert train(tiny_config(steps=2), tmp_path, draw=False).status == "finished"


# Numbers.


def test_bad_batches_at_one_percent_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 200
    bad = set(random.Random(0).sample(range(1, steps + 1), steps // 100))
    loss, at = LanguageTask.loss, [0]

    def spoilt(self: LanguageTask, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = loss(self, model, batch)
        at[0] += model.training
        return value * float("nan") if model.training and at[0] in bad else value

    monkeypatch.setattr(LanguageTask, "loss", spoilt)
    result = train(tiny_config(steps=steps), tmp_path / "run", draw=False)
    metrics = RunFolder(tmp_path / "run").metrics()
    assert {line["step"] for line in metrics if line.get("loss", 0) is None} == bad
    assert result.status == "finished"
    assert result.val_loss is not None
    assert result.val_loss < metrics[0]["val_loss"] - 0.5
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("name", ["mada", "hyperadam", "avgrad", "adamw"])
def test_spikes_of_the_learning_rate(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the learning rate at one step in fifty: everything stays finite, and the run goes on."""
    rate = ResolvedRun.learning_rate
    monkeypatch.setattr(
        ResolvedRun, "learning_rate", lambda self, step: rate(self, step) * (100 if step % 50 == 25 else 1)
    )
    result = train(tiny_config(name, steps=200), tmp_path / "run", draw=False)
    assert result.status == "finished"
    assert_finite(tmp_path / "run")


def test_a_learning_rate_that_is_far_too_high_ends_the_run_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4"]
    arguments = ["--steps", "40", "--lr", "1e37", "--threads", "1", "--quiet", "--out", str(tmp_path / "run")]
    assert main(["train", *model, *arguments]) == 1
    assert re.search(r"the run diverged: no finite loss .* up to step \d+. Try a lower --lr", capsys.readouterr().err)


def assert_finite(folder: Path) -> None:
    """Weights, buffers and coefficients of the last checkpoint."""
    checkpoint = RunFolder(folder).load_checkpoint()
    assert checkpoint is not None
    optimizer = checkpoint["optimizer"]
    tensors = [*checkpoint["model"].values(), *(t for state in optimizer["state"].values() for t in state.values())]
    tensors += [v for group in optimizer["param_groups"] for v in group.values()]
    assert all(bool(t.isfinite().all()) for t in tensors if isinstance(t, torch.Tensor))
