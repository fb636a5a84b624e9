"""Wrappers around optimizers: what they keep in parameter groups is theirs, and never becomes a coefficient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer as peers
import torch
from problems import ADAM, Net, loss_of
from torch import Tensor, nn
from torch.optim import Optimizer

from mada_optim import MADA, OMADA, AVGrad, load_optimizer

Make = Callable[..., Optimizer]


class PublishedSAM(Optimizer):
    """Sharpness-aware minimization as D. Samuel's implementation does it (github.com/davda54/sam)."""

    def __init__(self, params: Any, base_optimizer: Make, rho: float = 0.05, adaptive: bool = False, **kwargs: Any):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        before = [param.clone() for param in params]
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=group["rho"] / float(norm))
        with torch.enable_grad():
            closure()
        for param, value in zip(params, before, strict=True):
            param.copy_(value)
        self.base_optimizer.step()


# Each makes a wrapper around an optimizer of some class for a model.
WRAPPERS: dict[str, Callable[..., Any]] = {
    "published SAM": lambda model, make, **kwargs: PublishedSAM(model.parameters(), make, rho=0.05, **kwargs),
    "SAM": lambda model, make, **kwargs: peers.SAM(model.parameters(), make, rho=0.05, **kwargs),
    "FriendlySAM": lambda model, make, **kwargs: peers.FriendlySAM(model.parameters(), make, rho=0.05, **kwargs),
    "LookSAM": lambda model, make, **kwargs: peers.LookSAM(model.parameters(), make, rho=0.05, k=2, **kwargs),
    "WSAM": lambda model, make, **kwargs: peers.WSAM(model, model.parameters(), make, rho=0.05, **kwargs),
    "Lookahead": lambda model, make, **kwargs: peers.Lookahead(make(model.parameters(), **kwargs), k=2),
    "PCGrad": lambda model, make, **kwargs: peers.PCGrad(make(model.parameters(), **kwargs)),
    "TRAC": lambda model, make, **kwargs: peers.TRAC(make(model.parameters(), **kwargs)),
    "OrthoGrad": lambda model, make, **kwargs: peers.OrthoGrad(make(model.parameters(), **kwargs)),
    "schedule-free": lambda model, make, **kwargs: peers.ScheduleFreeWrapper(make(model.parameters(), **kwargs)),
}
SHARPNESS = ["published SAM", "SAM", "FriendlySAM", "LookSAM", "WSAM"]


def train(model: Net, wrapper: Any, name: str, steps: int, first: int = 0) -> None:
    if name == "schedule-free":
        wrapper.train()
    for step in range(first, first + steps):

        def closure(step: int = step) -> Tensor:
            wrapper.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if name == "PCGrad":
            torch.manual_seed(step)
            wrapper.pc_backward([loss_of(model, step), loss_of(model, step + 1)])
            wrapper.step()
        else:
            closure()
            wrapper.step(closure) if name in SHARPNESS else wrapper.step()


def inner(wrapper: Any) -> Any:
    return wrapper.base_optimizer if hasattr(wrapper, "base_optimizer") else wrapper.optimizer


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_does_what_it_does_with_adamw(name: str):
    models = [Net(), Net()]
    for model, make in zip(models, (load_optimizer("adamw"), torch.optim.AdamW), strict=True):
        train(model, WRAPPERS[name](model, make, lr=1e-2, betas=(0.8, 0.95)), name, 6)
    for own, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("make", [MADA, AVGrad, OMADA, load_optimizer("mada-paper")])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_with_what_learns(name: str, make: type[Optimizer]):
    model = Net(torch.float32)
    options: dict[str, Any] = {} if make is AVGrad else {"hyper_warmup": 0, "hyper_clip": 1.0}
    wrapper = WRAPPERS[name](model, make, lr=1e-2, **options)
    start = inner(wrapper).coefficients()
    assert start["rho"] == (0.0 if make is AVGrad else 1.0)
    train(model, wrapper, name, 6)
    groups = wrapper.param_groups
    assert name not in SHARPNESS or groups[0]["rho"] == 0.05
    assert (inner(wrapper).coefficients() == start) == (make in (AVGrad, OMADA))
    assert (inner(wrapper).scale is None) == (make is not OMADA)
    saved = copy.deepcopy(inner(wrapper).state_dict())
    assert name not in SHARPNESS or saved["param_groups"][0]["rho"] == 0.05


@pytest.mark.parametrize("make", [MADA, AVGrad, OMADA])
@pytest.mark.parametrize("name", ADAM)
def test_a_key_of_a_group_is_no_coefficient(make: type[Optimizer], name: str):
    optimizer = make([{"params": [nn.Parameter(torch.ones(3))], name: "something else"}])
    assert optimizer.coefficients() == make([nn.Parameter(torch.ones(3))]).coefficients()
    assert optimizer.param_groups[0][name] == "something else"


def test_initial_values_of_groups_stand_under_start():
    groups = [
        {"params": [nn.Parameter(torch.ones(3))], "start": {"rho": 0.5}},
        {"params": [nn.Parameter(torch.ones(3))]},
    ]
    optimizer = MADA(groups, hyper_per_group=True, c=0.75)
    assert [(q["rho"], q["c"]) for q in map(optimizer.coefficients, (0, 1))] == [(0.5, 0.75), (1.0, 0.75)]
    with pytest.raises(ValueError, match=r"sets 'start' to {'rho': 0.5}.*{'rho': 1.0}.*hyper_per_group=True"):
        MADA(groups)
    MADA(groups, rho=0.5)
    for start, error, message in (
        ({"sigma": 0.5}, ValueError, "coefficient: unknown name 'sigma'"),
        ({"rho": 2.0}, ValueError, "rho must be a number"),
        (0.5, TypeError, "start of a parameter group must be a mapping"),
        ({"beta1": 0.5}, ValueError, "start has 'beta1', and so has betas"),
    ):
        group = {"params": [nn.Parameter(torch.ones(3))], "start": start, "betas": (0.9, 0.99)}
        with pytest.raises(error, match=message):
            MADA([group], hyper_per_group=True)
    with pytest.warns(UserWarning, match="have no effect, also rho; .*under 'start': {'rho': 0.5}") as caught:
        former = MADA([{"params": [nn.Parameter(torch.ones(3))], "rho": 0.5}], hyper_per_group=True)
    assert former.coefficients()["rho"] == 1.0
    assert caught[0].filename == __file__
