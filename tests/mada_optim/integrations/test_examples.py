"""Every example runs, learns, and leaves the path of the coefficients in its framework's own log."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import torchrun
from problems import ADAM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mada_optim import HypergradientOptimizer
from mada_optim.integrations import unwrap

# The coefficients stand still for 50 steps and move after that.
STEPS, EVERY = 60, 20


@pytest.fixture(autouse=True)
def _process_as_new() -> Iterator[None]:
    """What the frameworks keep for the whole process: accelerate's state, environment variables, determinism."""
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A part of the embedded text."""
    characters = importlib.import_module("characters")
    path = tmp_path / "text"
    path.write_text("\n\n".join(characters.topics[name] for name in sorted(characters.topics))[:70_000], "utf-8")
    return path


def run(name: str, *arguments: Any) -> Any:
    return importlib.import_module(name).main([str(argument) for argument in arguments])


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar in the TensorBoard events under a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def check_log(
    folder: Path, steps: list[int], prefix: str = "", optimizer: HypergradientOptimizer | None = None
) -> None:
    scalars = logged(folder)
    coefficients = {name: scalars[f"{prefix}coefficients/{name}"] for name in ADAM}
    for path in [*coefficients.values(), scalars[f"{prefix}loss"]]:
        assert [step for step, _ in path] == steps
    assert {name: path[0][1] for name, path in coefficients.items()} == pytest.approx(ADAM | {"beta2": 0.99})
    assert coefficients["beta1"][-1][1] != coefficients["beta1"][0][1]
    if optimizer is not None:
        assert {name: path[-1][1] for name, path in coefficients.items()} == pytest.approx(optimizer.coefficients())
    assert scalars[f"{prefix}coefficients/skipped_hypergradients"][-1][1] == 0
    assert scalars[f"{prefix}loss"][-1][1] < scalars[f"{prefix}loss"][0][1] - 0.3


def test_plain_loop(text: Path, tmp_path: Path) -> None:
    run("plain_loop", "--data", text, "--steps", STEPS, "--log-every", EVERY, "--out", tmp_path / "out")
    check_log(tmp_path / "out", [20, 40, 60])
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["optimizer"]["state"][0]["step"] == STEPS


def test_accelerate(text: Path, tmp_path: Path) -> None:
    """Two batches to a step, in bfloat16."""
    run("accelerate_loop", "--data", text, "--steps", STEPS, "--log-every", EVERY, "--out", tmp_path / "out", "--cpu")
    check_log(tmp_path / "out", [20, 40, 60])


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without distributed, or without gloo",
)
def test_accelerate_on_two_processes(text: Path, tmp_path: Path) -> None:
    """DDP. An epoch has half as many batches for each process; it is to be as long as for one."""
    text.write_text(2 * text.read_text("utf-8"), "utf-8")
    example = importlib.import_module("accelerate_loop").__file__
    arguments = ["--data", text, "--steps", STEPS, "--log-every", EVERY, "--out", tmp_path / "out", "--cpu"]
    torchrun(*map(str, [example, *arguments]))
    check_log(tmp_path / "out", [20, 40, 60])


def test_accelerate_resumes_bit_for_bit(text: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from characters import Characters, Model

    from mada_optim import MADA

    data = Characters(text)

    def make(seed: int) -> tuple[Accelerator, Any, Any]:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        model = Model(len(data.vocabulary), width=16)
        return accelerator, *accelerator.prepare(model, MADA(model.parameters(), lr=1e-2, hyper_warmup=2))

    def train(accelerator: Accelerator, model: Any, optimizer: Any, first: int) -> None:
        for index in range(first, first + 5):
            optimizer.zero_grad()
            accelerator.backward(model(*(tensor[None] for tensor in data[index])))
            optimizer.step()

    accelerator, model, optimizer = make(0)
    train(accelerator, model, optimizer, 0)
    accelerator.save_state(tmp_path / "state")
    train(accelerator, model, optimizer, 5)
    accelerator, resumed, other = make(1)
    accelerator.load_state(tmp_path / "state")
    train(accelerator, resumed, other, 5)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert unwrap(optimizer).coefficients() == unwrap(other).coefficients()
    assert unwrap(optimizer).coefficients()["beta1"] != 0.9


def test_transformers_logs_and_resumes_bit_for_bit(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", text, "--steps", 2 * STEPS, "--log-every", 2 * EVERY, "--cpu"]
    trainer = run("transformers_trainer", *arguments, "--out", tmp_path / "whole")
    optimizer = unwrap(trainer.optimizer)
    check_log(tmp_path / "whole", [40, 80, 120], "train/", optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    history = [line for line in trainer.state.log_history if "coefficients/beta1" in line]
    assert [line["step"] for line in history] == [40, 80, 120]
    assert history[-1]["coefficients/beta1"] == optimizer.coefficients()["beta1"]

    shutil.copytree(tmp_path / "whole" / "checkpoint-60", tmp_path / "resumed" / "checkpoint-60")
    resumed = run("transformers_trainer", *arguments, "--out", tmp_path / "resumed", "--resume")
    assert resumed.state.global_step == 2 * STEPS
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert unwrap(resumed.optimizer).coefficients() == optimizer.coefficients()


def test_transformers_with_an_optimizer_that_is_there(text: Path, tmp_path: Path) -> None:
    trainer = run("transformers_trainer", "--data", text, "--steps", 4, "--out", tmp_path, "--cpu", "--all-decay")
    optimizer = unwrap(trainer.optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
    assert all(int(state["step"]) == 4 for state in optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_transformers_with_omada(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", text, "--steps", 4, "--cpu", "--omada"]
    trainer = run("transformers_trainer", *arguments, "--out", tmp_path)
    groups = unwrap(trainer.optimizer).param_groups
    # Two groups of matrices: each of c_attn's weights holds three.
    assert [group["matrices"] for group in groups] == [True, True, False, False]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]
    assert [group["split"] is not None for group in groups] == [False, True, False, False]
    names = {name for group in groups if group["matrices"] for name in group["param_names"]}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names >= {f"transformer.h.{number}.{layer}.weight" for number in (0, 1) for layer in layers}
    assert not any("wte" in name or "lm_head" in name for name in names)
    assert set(unwrap(trainer.optimizer).scale.values) == {"matrices", "rest"}

    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run("transformers_trainer", *arguments, "--out", tmp_path / "resumed", "--resume")
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_trainer_for_omada_makes_other_optimizers_as_the_trainer_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from mada_optim import MADA, OMADA
    from mada_optim.integrations.transformers import OMADATrainer
    from mada_optim.scale.rate import given_rate

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    arguments = TrainingArguments(output_dir=tmp_path, learning_rate=2e-3, report_to="none", use_cpu=True)
    made = OMADATrainer(model, arguments, optimizer_cls_and_kwargs=(MADA, {"lr": 3e-3})).create_optimizer()
    assert type(made) is MADA
    assert len(made.param_groups) == 2
    made = OMADATrainer(model, arguments).create_optimizer()
    assert type(made) is OMADA
    assert given_rate(made.param_groups[0]["lr"]) == 2e-3  # what is used is still to be found
    said = {"matrices": {"*.mlp.*": False}, "split": {"*.wte.weight": 11}}
    made = OMADATrainer(model, arguments, optimizer_cls_and_kwargs=(OMADA, said)).create_optimizer()
    names = [name for group in made.param_groups if group["matrices"] for name in group["param_names"]]
    assert names == [f"transformer.{name}.weight" for name in ("h.0.attn.c_proj", "wte", "h.0.attn.c_attn")]


# Of Lightning itself with this torch; its advice on data loaders; that a resumed run is in another folder.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_lightning(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", text, "--steps", STEPS, "--log-every", EVERY, "--accelerator", "cpu"]
    trainer = run("lightning_trainer", *arguments, "--out", tmp_path / "out")
    # Lightning counts from 0.
    check_log(tmp_path / "out", [19, 39, 59], optimizer=trainer.optimizers[0])

    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    resumed = run("lightning_trainer", *arguments, "--out", tmp_path / "resumed", "--resume", checkpoint)
    one, other = (t.optimizers[0].state_dict() for t in (trainer, resumed))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    assert trainer.optimizers[0].coefficients() == resumed.optimizers[0].coefficients()
    assert trainer.optimizers[0].coefficients()["beta1"] != 0.9


def test_own_family(text: Path) -> None:
    """Starts without momentum, and learns some."""
    optimizer = run("own_family", "--data", text, "--steps", 40)
    assert optimizer.coefficients()["momentum"] > 0.02
    frozen = type(optimizer)(
        [torch.nn.Parameter(torch.zeros(3))], optimizer.family, start={"momentum": 0.0}, hyper_lr={"nesterov": 0.1}
    )
    frozen.param_groups[0]["params"][0].grad = torch.ones(3)
    frozen.step()
    assert "velocity" not in frozen.state[frozen.param_groups[0]["params"][0]]


def test_frameworks_are_not_imported_before_they_are_needed() -> None:
    code = "import sys, mada_optim, mada_optim.integrations; print([n for n in sys.argv[1:] if n in sys.modules])"
    command = [sys.executable, "-c", code, "transformers", "lightning", "accelerate", "tensorboard"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
