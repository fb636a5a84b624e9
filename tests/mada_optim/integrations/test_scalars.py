"""The names under which coefficients are logged."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from problems import ADAM, Net, train
from torch.utils.data import DataLoader

from mada_optim import MADA, OMADA, AVGrad, LearnedScale
from mada_optim.integrations import lightning as callback
from mada_optim.integrations import scalars, unwrap
from mada_optim.integrations.lightning import LogCoefficients


def optimizer(**kwargs: object) -> MADA:
    params = list(Net().parameters())
    return MADA([{"params": params[:3]}, {"params": params[3:]}], **kwargs)


def test_one_set_of_coefficients():
    own = optimizer(rho=0.5)
    assert scalars(own) == {f"coefficients/{name}": own.coefficients()[name] for name in ADAM} | {
        **{"coefficients/lr_0": 1e-3, "coefficients/lr_1": 1e-3},
        "coefficients/skipped_hypergradients": 0,
    }
    assert scalars(own, prefix="")["rho"] == 0.5


def test_a_set_for_each_group():
    model = Net()
    params = list(model.parameters())
    own = MADA(
        [{"params": params[:3], "start": {"rho": 0.2}}, {"params": params[3:]}],
        hyper_per_group=True,
        hyper_warmup=0,
        hyper_delay=0,
    )
    train(model, own, 3)
    model.out.weight.grad.fill_(float("nan"))
    own.step()
    others = {"q/skipped_hypergradients", "q/lr_0", "q/lr_1"}
    assert set(scalars(own, "q/")) == {f"q/{i}/{name}" for i in (0, 1) for name in ADAM} | others
    assert scalars(own, "q/")["q/0/rho"] == own.coefficients(0)["rho"] != own.coefficients(1)["rho"]
    assert scalars(own)["coefficients/skipped_hypergradients"] == 1


def test_the_learning_rate_in_use_is_the_found_one_times_the_schedule():
    model = Net()
    own = OMADA(model, lr=7.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5 if step > 2 else 1.0)
    for step in range(4):
        train(model, own, 1, first=step)
        schedule.step()
    own.scale.hold()
    train(model, own, 1)
    logged = scalars(own, "")
    for kind in ("matrices", "rest"):
        assert logged[f"learning_rate_{kind}"] == own.scale.values[kind]
        assert logged[f"lr_{kind}"] == pytest.approx(0.5 * own.scale.values[kind])
    assert {group["lr"] for group in own.param_groups} == {logged["lr_matrices"], logged["lr_rest"]}


def test_an_optimizer_of_torch_with_a_learned_scale():
    model = Net()
    own = torch.optim.AdamW(model.parameters(), lr=7.0)
    scale = LearnedScale(own)
    train(model, own, 3)
    expected = {"lr": own.param_groups[0]["lr"], "learning_rate_all": scale.learning_rate}
    assert scalars(SimpleNamespace(optimizer=own), "") == pytest.approx(expected)


def test_wrappers_and_other_optimizers():
    own, other = optimizer(), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=own))) is own
    assert unwrap(SimpleNamespace(base_optimizer=own)) is own
    assert unwrap(SimpleNamespace(optimizer=other)) is None
    with pytest.raises(
        TypeError, match="must be a mada_optim.HypergradientOptimizer or have a LearnedScale, got AdamW"
    ):
        scalars(other)


class TwoOptimizers(LightningModule):
    """As a GAN has them, at rates of their own: the first steps at every batch, the others at every third."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        makers = (partial(MADA, rho=0.5), torch.optim.AdamW, AVGrad)
        return [make(net.parameters(), lr=0.1) for make, net in zip(makers, self.nets, strict=True)]

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        for number, (net, own) in enumerate(zip(self.nets, self.optimizers(), strict=True)):
            if number == 0 or index % 3 == 0:
                own.zero_grad()
                self.manual_backward(net(batch).square().mean())
                own.step()
        self.log("loss", 1.0)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:You set `Trainer.log_every_n_steps")
@pytest.mark.parametrize(("every", "steps"), [(4, [3, 7]), (0, [])])
def test_several_optimizers_in_lightning(
    every: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have coefficients are told apart, others passed over; they are read only where the Trainer logs."""
    reads = []
    monkeypatch.setattr(callback, "scalars", lambda *a: (reads.append(a), scalars(*a))[1])
    logger = CSVLogger(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, log_every_n_steps=every, callbacks=[LogCoefficients()], **quiet
    )
    trainer.fit(TwoOptimizers(), DataLoader(torch.ones(10, 1)))
    rows = []
    if steps:
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == steps
    assert len(reads) == 2 * len(steps)
    for row in rows:
        assert float(row["coefficients/optimizer0/rho"]) == 0.5
        assert float(row["coefficients/optimizer2/rho"]) == 0.0
        assert row["loss"] == "1.0"
        assert sum(name.startswith("coefficients/") for name in row) == 2 * (len(ADAM) + 2)
