"""What experiments can train with: every entry trains and resumes; those put together here are what they claim."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Net, loss_of, train
from tiny import assert_same_run, tiny_config, without_times
from torch import nn

from mada_lab.errors import InputError
from mada_lab.optimizers import build as optimizers
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.optimizers.peers import MuonWithAdamW
from mada_lab.optimizers.registry import ENTRIES
from mada_lab.optimizers.variants import MaximumMADA, ZeroedGradientMADA
from mada_lab.run.train import train as train_run
from mada_lab.tasks.language import LanguageConfig
from mada_optim.matrices import matrix_parameters

# The start of those that find their step size, 1e-6 or 1e-8, takes more than 30 steps to grow.
CONFIGS = {
    "lion": OptimizerConfig("lion", lr=1e-3),
    "prodigy": OptimizerConfig("prodigy", lr=1.0, options={"d0": 1e-3}),
    "dadaptation": OptimizerConfig("dadaptation", lr=1.0, options={"d0": 1e-3}),
    "dog": OptimizerConfig("dog", lr=3.0, options={"reps_rel": 1e-3}),
    "mechanic": OptimizerConfig("mechanic", lr=1e3),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_trains_and_resumes(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), optimizer=CONFIGS.get(name, OptimizerConfig(name, lr=1e-2)))
    result = train_run(config, tmp_path / "whole", draw=False)
    lines = without_times(tmp_path / "whole")
    assert result.val_loss is not None
    assert result.val_loss < lines[0]["val_loss"] - 0.2
    with pytest.raises(ZeroDivisionError):
        train_run(config, tmp_path / "cut", on_step=lambda report: 1 // (11 - report.step))  # type: ignore[arg-type,return-value]
    train_run(config, tmp_path / "cut", resume=True, draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_schedule_free_keeps_its_learning_rate_and_validates_its_average(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), optimizer=OptimizerConfig("schedulefree", lr=1e-2))
    train_run(config, tmp_path / "run", draw=False)
    lines = without_times(tmp_path / "run")
    assert [line["lr"] for line in lines if "lr" in line][-20:] == [1e-2] * 20
    train_run(dataclasses.replace(config, final_lr=0.1), tmp_path / "falls", draw=False)
    assert [line["lr"] for line in without_times(tmp_path / "falls") if "lr" in line][-1] == pytest.approx(1e-3)


def _muon(model: nn.Module) -> MuonWithAdamW:
    optimizer = optimizers.build(optimizers.resolve_optimizer(OptimizerConfig("muon", lr=1e-2)), model)
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


def test_muon_is_torchs_muon_and_adamw() -> None:
    ours, theirs = Net(torch.float32), Net(torch.float32)
    muon = torch.optim.Muon([theirs.hidden.weight], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = [theirs.embedding.weight, theirs.out.weight]
    rest = [theirs.norm.weight, theirs.norm.bias, theirs.hidden.bias, theirs.out.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 1e-2, (0.9, 0.99), fused=True)
    train(ours, _muon(ours), 5)
    for step in range(5):
        theirs.zero_grad()
        loss_of(theirs, step).backward()
        muon.step()
        adamw.step()
    for name, param in ours.named_parameters():
        assert torch.equal(param, theirs.get_parameter(name)), name


def test_muon_takes_each_expert_of_a_stack_as_a_matrix() -> None:
    """And a fused projection as one, as torch's Muon by itself does."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": nn.Bilinear(4, 5, 3), "attention": nn.MultiheadAttention(8, 2)})
    model["head"] = nn.Linear(8, 2)
    fused = model["attention"].in_proj_weight
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    alone = [nn.Parameter(expert.detach().clone()) for expert in (*model["experts"].weight, fused)]
    for param, grad in zip(alone, (*model["experts"].weight.grad, fused.grad), strict=True):
        param.grad = grad.clone()
    _muon(model).step()
    torch.optim.Muon(alone, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    for expert, other in zip((*model["experts"].weight, fused), alone, strict=True):
        assert torch.equal(expert, other)


def test_muon_takes_a_convolution_as_a_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    before = model[0].weight.detach().clone()
    optimizer = _muon(model)
    model(torch.randn(4, 3, 3, 3)).square().mean().backward()
    optimizer.step()
    kernel = nn.Parameter(before.flatten(1))
    kernel.grad = model[0].weight.grad.flatten(1)
    torch.optim.Muon([kernel], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(model[0].weight.flatten(1), kernel)
    optimizer.zero_grad()
    assert model[0].weight.grad is None


def test_matrices_of_gpt2_are_its_hidden_weights() -> None:
    model = tiny_config().task.build().model(0)
    names = {id(param): name for name, param in model.named_parameters()}
    found = {names[id(param)] for param in matrix_parameters(model)}
    assert found == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_the_maximum_in_the_family_is_amsgrad() -> None:
    ours, theirs = Net(), Net()
    train(ours, MaximumMADA(ours.parameters(), 1e-2, rho=0.0, hyper_lr=0.0), 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), 1e-2, amsgrad=True), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_zeroed_gradient_makes_the_difference_a_momentum() -> None:
    """At a constant gradient Adan's average of differences is 0; the authors' tends to the gradient."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = ZeroedGradientMADA([weight], beta3=0.5, hyper_lr=0.0)
    for _ in range(20):
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_diff"], weight.grad, rtol=1e-5, atol=0.0)


# Options: honoured or refused, never dropped.


def test_betas_of_an_optimizer_without_betas_are_refused() -> None:
    with pytest.raises(InputError, match="optimizer dog: .*betas"):
        optimizers.resolve_optimizer(OptimizerConfig("dog", betas=(0.6, 0.7)))


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "dog"])
def test_options_that_are_fields_are_honoured(name: str) -> None:
    by_option = OptimizerConfig(name, options={"weight_decay": 5.0, "betas": [0.6, 0.7]})
    assert by_option == OptimizerConfig(name, weight_decay=5.0, betas=(0.6, 0.7))
    groups = optimizers.build(optimizers.resolve_optimizer(by_option), tiny_config().task.build().model(0)).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 5.0}
    for group in groups:
        betas = group["betas"] if "betas" in group else group.get("coefficients", (None,))[:2]
        assert "momentum" in group or [float(beta) for beta in betas] == pytest.approx([0.6, 0.7])


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("option", ["lr", "name", "params", "no_such_option"])
def test_options_that_cannot_be_honoured_are_refused(name: str, option: str) -> None:
    with pytest.raises(InputError, match=rf"{name}.*{option}|{option}.*{name}"):
        optimizers.resolve_optimizer(OptimizerConfig(name, options={option: 1.0}))


def test_an_option_says_what_the_field_says() -> None:
    assert OptimizerConfig("adamw", weight_decay=0.5, options={"weight_decay": 0.5}).options == {}
    with pytest.raises(
        InputError, match="weight_decay in the options of adamw must be 0.1, as outside of them, got 0.5"
    ):
        OptimizerConfig("adamw", weight_decay=0.1, options={"weight_decay": 0.5})
    with pytest.raises(InputError, match="betas must be two numbers, got 0.1"):
        OptimizerConfig("adamw", options={"betas": 0.1})


@pytest.mark.parametrize("option", ["maximize", "foreach", "capturable", "differentiable", "fused"])
def test_muon_takes_no_option_that_only_a_part_of_it_would_know(option: str) -> None:
    with pytest.raises(InputError, match=f"optimizer muon: .*{option}"):
        optimizers.resolve_optimizer(OptimizerConfig("muon", options={option: True}))


def test_options_of_muon_reach_their_part() -> None:
    options = {"momentum": 0.5, "nesterov": False, "ns_steps": 3, "eps": 1e-3, "amsgrad": True}
    optimizer = optimizers.build(
        optimizers.resolve_optimizer(OptimizerConfig("muon", options=options)), Net(torch.float32)
    )
    muon, adamw = (part.param_groups[0] for part in optimizer.parts)
    assert (muon["momentum"], muon["nesterov"], muon["ns_steps"]) == (0.5, False, 3)
    assert (adamw["eps"], adamw["amsgrad"]) == (1e-3, True)
    with pytest.raises(InputError, match="momentum"):  # before anything is trained
        optimizers.resolve_optimizer(OptimizerConfig("muon", options={"momentum": -1.0}))


@pytest.mark.parametrize(("name", "lr"), [("lion", 1e-3), ("prodigy", 1.0), ("adamw", 3e-3)])
def test_default_rates(name: str, lr: float) -> None:
    assert optimizers.resolve_optimizer(OptimizerConfig(name)).lr == lr
    assert optimizers.resolve_optimizer(OptimizerConfig(name, lr=0.5)).lr == 0.5


def test_a_new_preset_needs_no_entry() -> None:
    """It has one, of its docstring, where this module is imported after the preset."""
    code = (
        "from mada_optim import MADA\n"
        "class Halfway(MADA, name='halfway', rho=0.5, hyper_lr=0.0):\n    'Between Adam and AVGrad.'\n"
        "from mada_lab.optimizers.registry import find\nprint(find('halfway').description)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Between Adam and AVGrad.\n"


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="optimizer must be one of adam, .*, got 'sgd'"):
        optimizers.resolve_optimizer(OptimizerConfig("sgd"))


@pytest.mark.parametrize("seed", [0, 1])
def test_omada_does_not_run_away_on_a_small_noisy_run(seed: int, tmp_path: Path) -> None:
    """A search that climbs three times as fast ends at a learning rate of 1 here, and a loss of 2.9."""
    task = LanguageConfig(layers=1, heads=2, width=32, context=16, batch=4, val_windows=8)
    config = dataclasses.replace(tiny_config("omada", steps=400, eval_every=400, checkpoint_every=400), task=task)
    config = dataclasses.replace(config, seed=seed)
    result = train_run(config, tmp_path / "run", draw=False)
    assert 1e-3 < result.coefficients["scale_matrices"] < 0.05
    assert result.val_loss is not None
    assert result.val_loss < 2.65
