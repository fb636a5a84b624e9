"""What is trained of a model that has weights: a new head, or adapters; and what it forgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import assert_same_run, tiny_config

from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig, from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.tasks import adaptation
from mada_lab.tasks.language import LanguageConfig
from mada_lab.tasks.registry import without_paths

SIZES = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "val_windows": 8}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on Python's language reference."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    train(tiny_config("adamw", steps=10), folder, draw=False)
    return folder


def task_of(earlier: Path, **changes: str) -> LanguageConfig:
    return LanguageConfig(init=str(earlier), **SIZES, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapt", ["head", "lora"])
def test_only_the_part_is_trained_and_resumes(adapt: str, earlier: Path, tmp_path: Path) -> None:
    options = {"scale": False}
    config = RunConfig(
        task_of(earlier, adapt=adapt),
        OptimizerConfig("omada", lr=3e-2, options=options),
        steps=24,
        eval_every=8,
        checkpoint_every=8,
        threads=1,
    )
    result = train(config, tmp_path / "whole", draw=False)
    before = RunFolder(tmp_path / "whole").metrics()[0]["val_loss"]
    assert result.val_loss is not None
    assert result.val_loss < before
    start = config.task.build().model(0).state_dict()
    checkpoint = RunFolder(tmp_path / "whole").load_checkpoint()
    assert checkpoint is not None
    changed = {name for name, tensor in checkpoint["model"].items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if name == "lm_head.weight" if adapt == "head"} | {
        name for name in start if "lora_" in name
    }
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "cut", on_step=lambda report: 1 // (11 - report.step))  # type: ignore[arg-type,return-value]
    train(config, tmp_path / "cut", resume=True, draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(InputError, match=f"adapt={adapt} trained a part of its model"):
        task_of(tmp_path / "whole").build()


def test_adapters_begin_as_nothing_and_a_new_head_depends_on_the_seed(earlier: Path) -> None:
    plain, adapted = (task_of(earlier, adapt=adapt).build() for adapt in ("all", "lora"))
    assert adapted.validate(adapted.model(0)) == pytest.approx(plain.validate(plain.model(0)))
    probe = task_of(earlier, adapt="head").build()
    heads = [probe.model(seed).get_parameter("lm_head.weight") for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_what_is_retained_of_another_text(earlier: Path, tmp_path: Path) -> None:
    """The loss on the earlier text is measured beside the one that is trained on."""
    task = LanguageConfig(**SIZES).build()  # type: ignore[arg-type]
    known = tmp_path / "known.txt"
    known.write_text("def f(x):\n    return x\n" * 200)
    other = tmp_path / "other.txt"
    other.write_text("to be or not to be " * 200)
    config = task_of(earlier, data=str(other), retained=str(known))
    trained = config.build()
    values = trained.validate(trained.model(0))
    same = LanguageConfig(data=str(known), init=str(earlier), **SIZES).build()  # type: ignore[arg-type]
    tokens = torch.cat([torch.from_numpy(part.astype("int64")) for part in (same.train, same.validation)]).numpy()
    expected = same.mean_loss(same.model(0), tokens, same.validation_starts(tokens))
    assert values["retained_loss"] == pytest.approx(expected)
    assert set(values) == {"loss", "retained_loss"}
    assert set(task.validate(task.model(0))) == {"loss"}


def test_adapters_without_their_package(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"adapt must be another one: the package peft is missing .*, got 'lora'"):
        task_of(earlier, adapt="lora").build()


def test_a_packed_configuration_can_be_read(earlier: Path) -> None:
    """It does not say where the weights lie."""
    packed = to_dict(RunConfig(task_of(earlier, adapt="lora")))
    packed["task"] = without_paths(packed["task"])
    assert "init" not in packed["task"]
    assert from_dict(packed).task == LanguageConfig(adapt="lora", **SIZES)  # type: ignore[arg-type]


def test_what_is_refused(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapt must be one of all, head, lora, got 'tail'"):
        LanguageConfig(adapt="tail")
    with pytest.raises(InputError, match="adapt must be all where there is no init"):
        LanguageConfig(adapt="lora").build()
    with pytest.raises(InputError, match="retained must be left out without init"):
        LanguageConfig(retained="x.txt")
    strange = tmp_path / "strange.txt"
    strange.write_text("λ" * 100)
    with pytest.raises(InputError, match="retained must be a text of characters that the model knows .it lacks 'λ'"):
        task_of(earlier, retained=str(strange)).build()
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(InputError, match="retained must be a text of more than 16 characters"):
        task_of(earlier, retained=str(short)).build()
