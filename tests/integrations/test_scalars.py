"""The names under which coefficients are logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from problems import Net, train

from mada_optim import MADA, AVGrad
from mada_optim.integrations import scalars, unwrap

NAMES = ["beta1", "beta2", "beta3", "rho", "c", "gamma"]


def optimizer(**kwargs: object) -> MADA:
    params = list(Net().parameters())
    return MADA([{"params": params[:3]}, {"params": params[3:]}], **kwargs)


def test_one_set_of_coefficients():
    own = optimizer(rho=0.5)
    assert scalars(own) == {f"coefficients/{name}": own.coefficients()[name] for name in NAMES} | {
        "coefficients/skipped_hypergradients": 0
    }
    assert scalars(own, prefix="")["rho"] == 0.5


def test_a_set_for_each_group():
    model = Net()
    params = list(model.parameters())
    own = MADA([{"params": params[:3], "rho": 0.2}, {"params": params[3:]}], hyper_per_group=True, hyper_warmup=0)
    train(model, own, 3)
    model.out.weight.grad.fill_(float("nan"))
    own.step()
    assert set(scalars(own, "q/")) == {f"q/{i}/{name}" for i in (0, 1) for name in NAMES} | {"q/skipped_hypergradients"}
    assert scalars(own, "q/")["q/0/rho"] == own.coefficients(0)["rho"] != own.coefficients(1)["rho"]
    assert scalars(own)["coefficients/skipped_hypergradients"] == 1


def test_wrappers_and_other_optimizers():
    own, other = optimizer(), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=own))) is own
    assert unwrap(SimpleNamespace(optimizer=other)) is None
    with pytest.raises(TypeError, match="must be a mada_optim.HypergradientOptimizer, got AdamW"):
        scalars(other)


def test_several_optimizers_in_lightning():
    """As a GAN has them: those that have coefficients are told apart, others passed over, and only where it logs."""
    from mada_optim.integrations.lightning import LogCoefficients

    logged: dict[str, float] = {}
    module = SimpleNamespace(log_dict=logged.update)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    average = AVGrad([torch.nn.Parameter(torch.zeros(1))])
    trainer = SimpleNamespace(global_step=9, log_every_n_steps=10, optimizers=[optimizer(), other, average])
    LogCoefficients().on_train_batch_end(trainer, module, None, None, 0)
    assert not logged
    trainer.global_step = 10
    LogCoefficients().on_train_batch_end(trainer, module, None, None, 0)
    assert logged["coefficients/optimizer0/rho"] == 1.0
    assert logged["coefficients/optimizer2/rho"] == 0.0
    assert len(logged) == 2 * (len(NAMES) + 1)
