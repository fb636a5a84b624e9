"""Tasks that need no file and no time: tables, a bandit, a GAN. Each property holds for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same_run
from torch import nn

from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig
from mada_lab.run.train import train
from mada_lab.tasks.bandit import BanditConfig
from mada_lab.tasks.base import TaskConfig
from mada_lab.tasks.gan import GanConfig, GanTask
from mada_lab.tasks.tabular import TabularConfig

CONFIGS: dict[str, TaskConfig] = {
    "diabetes": TabularConfig(),
    "digits as numbers": TabularConfig(table="digits", layers=1, width=8),
    "bandit": BanditConfig(width=4, batch=32),
    "gan": GanConfig(width=8, batch=16),
}
# A loss that a hundred steps reach from the one at the start.
LEARNS = {"diabetes": 0.8, "digits as numbers": 0.6, "bandit": 0.85}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_and_batches_are_functions_of_their_arguments(name: str) -> None:
    one, other = CONFIGS[name].build(), CONFIGS[name].build()
    other.batch(5, 9)
    torch.manual_seed(17)
    before = torch.random.get_rng_state()
    for step, seed in ((3, 0), (4, 0), (3, 1)):
        for tensors in zip(one.batch(seed, step), other.batch(seed, step), strict=True):
            assert torch.equal(*tensors)
    assert not torch.equal(one.batch(0, 3)[0], one.batch(0, 4)[0])
    assert not torch.equal(one.batch(0, 3)[0], one.batch(1, 3)[0])
    models = [task.model(1) for task in (one, other)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert one.validate(models[0]) == other.validate(models[1]) == one.validate(models[0])
    assert one.describe() == other.describe()


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_and_resumes(name: str, tmp_path: Path) -> None:
    steps = 100 if name in LEARNS else 24
    optimizer = OptimizerConfig("omada", lr=1e-2, options={"scale": False})
    config = RunConfig(CONFIGS[name], optimizer, steps=steps, eval_every=10, checkpoint_every=10, threads=1)
    result = train(config, tmp_path / "whole", draw=False)
    assert result.val_loss is not None
    assert result.val_loss < LEARNS.get(name, np.inf)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "cut", on_step=lambda report: 1 // (15 - report.step))  # type: ignore[arg-type,return-value]
    train(config, tmp_path / "cut", resume=True, draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_table_from_a_file(tmp_path: Path) -> None:
    """The target is the last column; the best constant has a loss of about 1, the rule of the table one of 0."""
    rows = np.random.default_rng(0).normal(3.0, 5.0, (200, 2))
    rows = np.column_stack([rows, np.ones(200), 2 * rows[:, 0] - rows[:, 1] + 7])
    path = tmp_path / "table.csv"
    np.savetxt(path, rows, delimiter=",", header="a,b,constant,target", comments="")
    task = TabularConfig(data=str(path), layers=1, batch=160).build()
    inputs, targets = task.batch(0, 1)  # all of the rows to train on
    assert (inputs.shape, targets.shape) == ((160, 3), (160, 1))
    assert inputs.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(inputs.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert task.loss(model, (inputs, targets)).item() == pytest.approx(1.0, rel=1e-4)
    solution = torch.linalg.lstsq(inputs, targets).solution
    with torch.no_grad():
        model.weight.copy_(solution.T)
    assert task.validate(model)["loss"] < 1e-6
    assert task.describe()["rows"] == 160


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,x\n2,3\n", "data must be a file of comma-separated numbers under one line of names, got"),
        ("a,b\n1,nan\n2,3\n", "all finite"),
        ("a\n1\n2\n", "2 columns or more"),
        ("a,b\n1,5\n2,5\n3,5\n4,5\n", "a table whose target varies"),
    ],
)
def test_tables_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        TabularConfig(data=str(path), batch=1).build()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (TabularConfig, {"table": "iris"}, "table must be one of diabetes, digits, got 'iris'"),
        (TabularConfig, {"layers": 0}, "layers must be a positive integer, got 0"),
        (GanConfig, {"data": "points.csv"}, "data must be left out"),
        (GanConfig, {"width": -1}, "width must be a positive integer, got -1"),
        (BanditConfig, {"batch": 0}, "batch must be a positive integer, got 0"),
    ],
)
def test_arguments_that_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**arguments)


def test_a_batch_larger_than_the_table() -> None:
    with pytest.raises(InputError, match="batch must be at most 354, got 355"):
        TabularConfig(batch=355).build()


def test_the_bandits_gradient_is_reinforces() -> None:
    """Over all actions its expectation is that of the expected reward, but for the baseline's own share."""
    task = BanditConfig(width=2, batch=4).build()
    model = task.model(0).double()
    images, labels, drawn = task.batch(0, 1)
    logits = model(images.double())
    p = logits.detach().softmax(1)
    actions = (p.cumsum(1) < drawn[:, None]).sum(1)
    reward = (actions == labels).double()
    expected = -((reward - reward.mean()) * F.log_softmax(logits, 1)[torch.arange(4), actions]).mean()
    torch.testing.assert_close(task.loss(model, (images, labels, drawn)), expected)
    # Numbers at both ends of [0, 1) draw the first and the last action.
    edges = torch.tensor([0.0, 1 - 1e-16, 0.0, 1 - 1e-16], dtype=torch.float64)
    chosen = torch.tensor([0, 9, 0, 9])
    matching = task.loss(model, (images, chosen, edges))
    assert matching.item() == 0.0  # all four are right: no reward is above their mean


def test_each_player_of_the_gan_gets_the_gradient_of_its_own_loss() -> None:
    task = GanConfig(width=8, batch=16).build()
    assert isinstance(task, GanTask)
    model = task.model(0)
    assert isinstance(model, nn.ModuleDict)
    noise, points = task.batch(0, 1)
    task.loss(model, (noise, points)).backward()
    drawn = model["generator"](noise)
    real, fake = model["discriminator"](points), model["discriminator"](drawn)
    ones = torch.ones_like(real)
    fooled = F.binary_cross_entropy_with_logits(fake, ones)
    told_apart = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, 0 * ones)
    for player, own_loss in (("generator", fooled), ("discriminator", told_apart)):
        params = list(model[player].parameters())
        for param, grad in zip(params, torch.autograd.grad(own_loss, params, retain_graph=True), strict=True):
            torch.testing.assert_close(param.grad, grad)


def test_a_perfect_generator_has_no_distance_and_all_modes() -> None:
    task = GanConfig().build()

    class Perfect(nn.Module):
        def forward(self, noise: torch.Tensor) -> torch.Tensor:
            return task._draw(np.random.default_rng(5), len(noise))[1]

    class Collapsed(nn.Module):
        def forward(self, noise: torch.Tensor) -> torch.Tensor:
            return torch.tensor([2.0, 0.0]) + 0.05 * noise[:, :2]

    scores = [
        task.validate(nn.ModuleDict({"generator": player, "discriminator": nn.Linear(2, 1)}))
        for player in (Perfect(), Collapsed())
    ]
    assert scores[0]["loss"] < 0.02 < 1.0 < scores[1]["loss"]
    assert [score["modes"] for score in scores] == [8.0, 1.0]
