"""The optimizers by name, or in one line, in each framework's own configuration; also those that need the model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

from mada_optim import MADA, OMADA, HypergradientOptimizer, available_optimizers, load_optimizer, matrix_groups
from mada_optim.integrations import transformers as ours
from mada_optim.integrations import unwrap
from mada_optim.integrations.transformers import OMADAFactory, register
from mada_optim.scale.rate import given_rate


@pytest.fixture(autouse=True)
def _process_as_new() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def gpt() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1))


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    options: dict[str, Any] = {"learning_rate": 2e-3, "report_to": "none", "use_cpu": True, "max_steps": 2}
    return TrainingArguments(folder, save_strategy="no", disable_tqdm=True, **(options | changed))


def trained(trainer: Trainer) -> HypergradientOptimizer:
    trainer.train_dataset = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())
    return optimizer


def matrices(optimizer: HypergradientOptimizer) -> list[str]:
    groups = optimizer.param_groups
    return [name for group in groups if group.get("matrices") for name in group["param_names"]]


def decays(optimizer: HypergradientOptimizer) -> set[float]:
    return {group["weight_decay"] for group in optimizer.param_groups}


HIDDEN = [f"transformer.h.0.{name}.weight" for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", "attn.c_attn")]


def test_transformers_trains_every_optimizer_by_its_name(tmp_path: Path) -> None:
    names = register()
    assert {"mada", "omada", "avgrad"} <= set(names) <= set(available_optimizers())
    assert register() == names  # again, nothing changes
    for name in names:
        optimizer = Trainer(gpt(), arguments(tmp_path, optim=name, weight_decay=0.3)).create_optimizer()
        assert type(optimizer) is load_optimizer(name)
        assert decays(optimizer) == {0.3, 0.0}
        assert given_rate(optimizer.param_groups[0]["lr"]) == 2e-3


def test_transformers_trains_omada_by_name(tmp_path: Path) -> None:
    """With the plain Trainer, and from options of a command line."""
    register()
    line = ["--output_dir", str(tmp_path), "--optim", "omada", "--optim_args", "row_norm=1.0", "--max_steps", "2"]
    line += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--adam_beta2", "0.95"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    optimizer = trained(Trainer(gpt(), parsed))
    assert type(optimizer) is OMADA
    assert matrices(optimizer) == HIDDEN
    assert optimizer.coefficients()["row_norm"] == 1.0
    assert optimizer.coefficients()["beta2"] == 0.95


def test_names_of_transformers_stay_its_own(tmp_path: Path) -> None:
    assert not {"adamw_torch", "sgd", "adafactor"} & set(register())
    assert type(Trainer(gpt(), arguments(tmp_path, optim="adamw_torch")).create_optimizer()) is torch.optim.AdamW


def test_wrong_names_of_arguments_are_refused(tmp_path: Path) -> None:
    register()
    wrong = Trainer(gpt(), arguments(tmp_path, optim="mada", optim_args="row=1.0"))
    with pytest.raises(ValueError, match="optim_args: mada has no argument 'row'; see help"):
        wrong.create_optimizer()


def test_a_transformers_without_this_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs"):
        register()


@pytest.mark.parametrize("chosen", [MADA, OMADAFactory])
def test_transformers_trains_with_a_class_or_a_factory(chosen: Any, tmp_path: Path) -> None:
    options = {"lr": 3e-3, "weight_decay": 0.1}
    optimizer = trained(
        Trainer(gpt(), arguments(tmp_path, weight_decay=0.1), optimizer_cls_and_kwargs=(chosen, options))
    )
    assert decays(optimizer) == {0.1, 0.0}
    assert matrices(optimizer) == (HIDDEN if chosen is OMADAFactory else [])


def test_the_factory_takes_patterns(tmp_path: Path) -> None:
    said = {"matrices": {"*.mlp.*": False}, "split": {"*.wte.weight": 11}}
    factory = Trainer(gpt(), arguments(tmp_path), optimizer_cls_and_kwargs=(OMADAFactory, said))
    names = ("attn.c_proj", "attn.c_attn")
    assert {name for name in matrices(factory.create_optimizer()) if ".h." in name} == {
        f"transformer.h.0.{name}.weight" for name in names
    }


@pytest.mark.parametrize("name", ["mada", "omada"])
def test_accelerate_trains_by_name(name: str) -> None:
    from accelerate import Accelerator

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer: Any = load_optimizer(name)(matrix_groups(model))
    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(torch.randn(16, 4), batch_size=8))
    for inputs in batches:
        optimizer.zero_grad()
        accelerator.backward(model(inputs).square().mean())
        optimizer.step()
    assert all(int(state["step"]) == 2 for state in unwrap(optimizer).state.values())


def test_groups_as_torchtitan_builds_them() -> None:
    """Its configuration names a pattern, an optimizer and the optimizer's arguments, which it puts into the group."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    common = {"fused": False, "foreach": False, "lr": 3e-3, "weight_decay": 0.1}
    hidden = {"params": [model[0].weight], "param_names": ["0.weight"], **common, "matrices": True}
    names, others = zip(*[(name, param) for name, param in model.named_parameters() if name != "0.weight"], strict=True)
    rest = {"params": list(others), "param_names": list(names), **common}
    optimizer = load_optimizer("omada")([hidden, rest])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert matrices(optimizer) == ["0.weight"]
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


YAML = """\
trainer: {max_steps: 2, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}
"""
CHOSEN = """\
model:
  optimizer:
    class_path: mada_optim.NAME
    init_args: {lr: 0.003, weight_decay: 0.1}
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("chosen", [MADA, OMADA])
def test_lightning_reads_the_optimizer_from_yaml(chosen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("jsonargparse", "4.39")
    module = importlib.import_module("lightning_cli")
    Path("given.yaml").write_text(YAML + CHOSEN.replace("NAME", chosen.__name__))
    optimizer = module.main(["fit", "--config", "given.yaml"]).trainer.optimizers[0]
    assert type(optimizer) is chosen
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    # MADA keeps the marks and uses none.
    assert [group["matrices"] for group in optimizer.param_groups] == [True, False]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_lightning_takes_the_optimizer_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("jsonargparse", "4.39")
    module = importlib.import_module("lightning_cli")
    Path("given.yaml").write_text(YAML)
    line = ["fit", "--config", "given.yaml", "--model.optimizer=mada_optim.OMADA"]
    optimizer = module.main([*line, "--model.optimizer.row_norm=1.0"]).trainer.optimizers[0]
    assert optimizer.coefficients()["row_norm"] == 1.0


def test_every_name_is_exported() -> None:
    assert set(ours.__all__) == {"LogCoefficients", "OMADAFactory", "OMADATrainer", "register"}
