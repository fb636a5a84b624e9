"""Bad input: an error that names what is wrong, before anything has changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from problems import IDS, TABLE, Net, Row, train

from mada_optim import MADA, OMADA, AVGrad, Coefficient, Family, HypergradientOptimizer, LearningRule, load_optimizer
from mada_optim.engine.coefficient_set import PREVIOUS_LR, SET_TENSORS


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, r"lr must be .* >= 0, got -0.001"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": "0.1"}, ValueError, "lr must be"),
        ({"lr": torch.tensor(-1e-3)}, ValueError, "lr must be a finite number >= 0"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be .* one element, got shape \(2,\)"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be .* got -0.1"),
        ({"eps": -1e-8}, ValueError, "eps must be .* got -1e-08"),
        ({"lion_betas": (0.9,)}, ValueError, r"lion_betas must be .* got \(0.9,\)"),
        ({"lion_betas": (0.9, 1.5)}, ValueError, "lion_betas must be"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers .* got 0.9"),
        ({"betas": (1.0, 0.999)}, ValueError, r"beta1 must be a number in \[0.01, 0.99\].* got 1.0"),
        ({"betas": (0.9, 0.9999), "hyper_lr": 1e-3}, ValueError, r"beta2 must be .* in \[0.5, 0.999\].*bounds.* got"),
        ({"betas": (0.9, 1.0), "hyper_lr": 0.0}, ValueError, "beta2 must be .* its domain, got 1.0"),
        ({"betas": (0.9, None)}, ValueError, "beta2 must be .* got None"),
        ({"rho": 1.5}, ValueError, r"rho must be a number in \[0.0, 1.0\].* got 1.5"),
        ({"gamma": -0.1, "hyper_lr": 0.0}, ValueError, "gamma must be"),
        ({"beta3": True}, ValueError, "beta3 must be a number"),
        ({"hyper_lr": -1.0}, ValueError, "hyper_lr of beta1 must be .* got -1.0"),
        ({"hyper_lr": "fast"}, ValueError, "hyper_lr of beta1 must be .* got 'fast'"),
        (
            {"hyper_lr": {"beta4": 0.1}},
            ValueError,
            "hyper_lr: unknown name 'beta4'.*beta1, beta2, beta3, rho, c, gamma",
        ),
        ({"hyper_lr": {"rho": float("inf")}}, ValueError, "hyper_lr of rho"),
        ({"hyper_momentum": 1.0}, ValueError, r"hyper_momentum must be a number in \[0, 1\), got 1.0"),
        ({"hyper_clip": 0.0}, ValueError, "hyper_clip must be a number > 0, got 0.0"),
        ({"hyper_warmup": -1}, ValueError, "hyper_warmup must be an integer >= 0, got -1"),
        ({"hyper_every": 0}, ValueError, "hyper_every must be an integer >= 1, got 0"),
        ({"hyper_every": 1.5}, ValueError, "hyper_every must be an integer"),
        ({"hyper_delay": 2}, ValueError, "hyper_delay must be 0 or 1, got 2"),
        ({"hyper_delay": True}, ValueError, "hyper_delay must be 0 or 1, got True"),
        ({"bounds": {"rho": (0.6, 0.4)}}, ValueError, r"bounds of rho must be .* got \(0.6, 0.4\)"),
        ({"bounds": {"rho": (0.0, 2.0)}}, ValueError, "bounds of rho"),
        ({"bounds": {"rho": 0.5}}, ValueError, "bounds of rho"),
        ({"bounds": {"sigma": (0.0, 1.0)}}, ValueError, "bounds: unknown name 'sigma'"),
        ({"bounds": [0.0, 1.0]}, TypeError, "bounds must be None or a mapping"),
        ({"maximize": "yes"}, TypeError, "maximize must be a bool, got 'yes'"),
        ({"hyper_per_group": 1}, TypeError, "hyper_per_group must be a bool"),
    ],
)
def test_bad_argument(kwargs, error, message):
    with pytest.raises(error, match=message):
        MADA([weight()], **kwargs)


def test_bad_parameters():
    shared = weight()
    with pytest.raises(ValueError, match="empty parameter list"):
        MADA([])
    with pytest.raises(ValueError, match="listed twice"):
        MADA([shared, shared])
    with pytest.raises(ValueError, match="more than one parameter group"):
        MADA([{"params": [shared]}, {"params": [shared]}])
    with pytest.raises(TypeError, match="floating-point or complex tensors, got torch.int64"):
        MADA([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(TypeError):
        MADA(weight())
    with pytest.raises(TypeError, match="an order that is the same in every run, got a set"):
        MADA([{"params": {shared}}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        MADA(["weight"])
    with pytest.raises(ValueError, match=r"must have 'params', got only \['param'\]"):
        MADA([{"param": [shared]}])
    with pytest.raises(ValueError, match="a conjugate view cannot be optimized"):
        MADA([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())])
    with pytest.raises(ValueError, match="non-leaf"):
        MADA([weight() * 2])


def test_groups_share_their_coefficients_unless_told_otherwise():
    with pytest.raises(ValueError, match="sets 'betas'.*hyper_per_group=True"):
        MADA([{"params": [weight()], "betas": (0.5, 0.9)}])
    with pytest.raises(ValueError, match="sets 'hyper_lr'"):
        MADA([{"params": [weight()], "hyper_lr": 0.1}])
    with pytest.raises(ValueError, match="hyper_per_group is an argument of the optimizer"):
        MADA([{"params": [weight()]}, {"params": [weight()], "hyper_per_group": True}])
    optimizer = MADA([{"params": [weight()], "betas": (0.5, 0.9)}], hyper_per_group=True)
    assert optimizer.coefficients()["beta1"] == 0.5


def test_bad_group_in_the_middle_of_a_training_changes_nothing():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    for bad in ({"params": [weight()], "lr": -1.0}, {"params": [weight(), next(model.parameters())]}, [weight()]):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
    after = optimizer.state_dict()
    assert [sorted(group) for group in before["param_groups"]] == [sorted(group) for group in after["param_groups"]]
    torch.testing.assert_close(before["state"], after["state"], rtol=0, atol=0)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_sparse_gradient_changes_nothing(row: Row):
    dense, embedding = weight(), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = row([dense, embedding.weight], lr=0.1)
    (dense.sum() + embedding(torch.tensor([1, 2])).sum()).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state


def test_frozen_coefficients_may_leave_the_box_in_which_they_would_be_learned():
    assert load_optimizer("adamw")([weight()], betas=(0.0, 0.9999)).coefficients()["beta2"] == 0.9999


def test_bad_family():
    class Empty(Family):
        coefficients = (Coefficient("a", 0.0, (0.0, 1.0), 0.1),)

        def buffers(self, q):
            return ()

        def update(self, state, grad, q, step):
            return grad * q["a"], {}

    with pytest.raises(TypeError, match="family must be an instance of mada_optim.Family"):
        HypergradientOptimizer([weight()], Empty)
    with pytest.raises(TypeError, match="unexpected argument 'momentum'"):
        HypergradientOptimizer([weight()], Empty(), momentum=0.9)
    assert HypergradientOptimizer([weight()], Empty()).coefficients() == {"a": 0.0}
    with pytest.raises(TypeError, match="family must be hashable, and Empty is not"):
        HypergradientOptimizer([weight()], dataclass(Empty)())


class Named(Family):
    """All of its names are as given."""

    def __init__(self, coefficient="a", constant="b", buffer="c", returned="c"):
        self.coefficients = (Coefficient(coefficient, 0.0, (0.0, 1.0), 0.1),)
        self.constants = {constant: 1.0}
        self.names = buffer, returned

    def buffers(self, q):
        return self.names[:1]

    def update(self, state, grad, q, step):
        return grad, {self.names[1]: grad}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"coefficient": "lr"}, "a coefficient or constant 'lr', a name that is taken"),
        ({"constant": "weight_decay"}, "'weight_decay', a name that is taken"),
        ({"constant": "params"}, "'params', a name that is taken"),
        ({"constant": "a"}, "'a', a name that is taken"),
        ({"buffer": "param"}, "a buffer 'param', a name that is taken"),
        ({"buffer": "pending_grad"}, "a buffer 'pending_grad', a name that is taken"),
    ],
)
def test_names_of_a_family(names, message):
    with pytest.raises(ValueError, match=message):
        HypergradientOptimizer([weight()], Named(**names))


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_family_returns_and_does_not_name(fused):
    param = weight()
    optimizer = HypergradientOptimizer([param], Named(returned="d"), hyper_lr=0.0, fused=fused)
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="update of Named returned 'd', which its buffers"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_constants_are_no_tensors():
    with pytest.raises(TypeError, match="b, a constant of Named, must not be a tensor"):
        HypergradientOptimizer([weight()], Named(), b=torch.ones(2))


KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "array": np.asarray,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "fraction": lambda value: type(value)(value) if isinstance(value, (tuple, int)) else Fraction(value),
}
# Numbers that every kind of float holds exactly.
NUMBERS = {
    "lr": 0.125,
    "weight_decay": 0.5,
    "eps": 2.0**-20,
    "betas": (0.875, 0.75),
    "lion_betas": (0.5, 0.75),
    "rho": 0.5,
    "hyper_lr": 0.125,
    "hyper_momentum": 0.5,
    "hyper_clip": 4.0,
    "hyper_warmup": 1,
    "hyper_every": 2,
    "hyper_delay": 0,
}


def of_kind(kind: str, value: Any) -> Any:
    """A number of that kind, integers as numpy's or a tensor; two as an array, a tensor or a tuple."""
    if isinstance(value, tuple) and kind in ("float32", "float64", "fraction"):
        return tuple(KINDS[kind](number) for number in value)
    if isinstance(value, int):
        return torch.tensor(value) if kind == "tensor" else np.int64(value)
    return KINDS[kind](value)


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_may_be_of_every_kind(kind: str, in_group: bool):
    results = []
    for numbers in (NUMBERS, {name: of_kind(kind, value) for name, value in NUMBERS.items()}):
        param = weight()
        bounds = {"rho": of_kind(kind, (0.25, 0.75))} if numbers is not NUMBERS else {"rho": (0.25, 0.75)}
        settings = {**numbers, "bounds": bounds}
        shown = {name: settings[name] for name in ("lr", "weight_decay", "eps", "betas", "lion_betas", "hyper_every")}
        optimizer = MADA([{"params": [param], **shown}] if in_group else [param], **settings)
        for _ in range(6):
            param.grad = param.detach().clone()
            optimizer.step()
        group = optimizer.param_groups[0]
        assert type(group["eps"]) is type(group["weight_decay"]) is float
        assert type(group["hyper_warmup"]) is int
        assert {type(beta) for beta in group["lion_betas"]} == {float}
        state = optimizer.state_dict()["param_groups"][0]
        for name in ("lr", "previous_lr"):
            assert float(state.pop(name)) == 0.125
        results.append((param.detach(), optimizer.coefficients(), repr(state)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert results[0][1]["rho"] != 0.5


@pytest.mark.parametrize("make", [AVGrad, OMADA, load_optimizer("lion")])
def test_numbers_of_every_kind_in_other_optimizers(make: Any):
    for kind in KINDS:
        optimizer = make([weight()], betas=of_kind(kind, (0.875, 0.75)), eps=of_kind(kind, 0.5))
        assert optimizer.coefficients()["beta2"] == 0.75
        betas = {} if make is load_optimizer("lion") else {"betas": of_kind(kind, (0.5, 0.75))}
        optimizer.add_param_group({"params": [weight()], **betas, "eps": np.float32(0.25)})
        assert not betas or optimizer.param_groups[1]["betas"] == (0.5, 0.75)
    marked = OMADA([{"params": [weight()], "matrices": np.bool_(False)}], ortho_momentum=np.float32(0.5))
    assert marked.param_groups[0]["matrices"] is False
    rule = LearningRule(np.float32(0.5), np.float32(4.0), np.int64(1), np.int64(2))
    assert rule.due(3)


def test_kinds_of_number_that_are_none():
    for value in (torch.ones(2), np.ones(2), True, "1", torch.tensor(0.5, requires_grad=True), float("nan")):
        with pytest.raises((ValueError, TypeError), match="weight_decay must be a finite number"):
            MADA([weight()], weight_decay=value)
    for betas in (torch.ones(3), np.float32(0.9), "ab", {0.9, 0.99}):
        with pytest.raises(ValueError, match="betas must be two numbers|beta1 must be a number"):
            MADA([weight()], betas=betas)
    with pytest.raises(ValueError, match="hyper_every must be an integer"):
        MADA([weight()], hyper_every=torch.tensor(2.0))


def test_numbers_may_be_numpys_in_a_hypergradients_scale():
    param = weight()
    optimizer = MADA([param], hyper_warmup=0)
    optimizer.hyper_grad_scale = np.float32(2.0)
    param.grad = torch.ones(3)
    optimizer.step()


def test_betas_with_which_gans_are_trained():
    with pytest.raises(ValueError, match=r"beta1 must be .*pass bounds={'beta1': \(0, 0.99\)}.*hyper_lr.*got 0"):
        MADA([weight()], betas=(0, 0.99))
    param = weight()
    optimizer = MADA([param], betas=(0, 0.99), bounds={"beta1": (0, 0.99)}, hyper_warmup=0)
    for step in range(4):
        param.grad = param.detach() + step
        optimizer.step()
    assert torch.isfinite(param).all()
    assert optimizer.coefficients()["beta1"] >= 0.0
    assert load_optimizer("adamw")([weight()], betas=(0, 0.99)).param_groups[0]["betas"] == (0.0, 0.99)
    with pytest.raises(ValueError, match=r"beta1 must be a number in \[0.01, 0.99\].* learned, got 1.5"):
        MADA([weight()], betas=(1.5, 0.99))  # no bounds help


def test_what_is_printed_is_what_was_set_and_the_coefficients():
    groups = [{"params": [weight(), weight()]}, {"params": [weight()], "lr": 0.5, "eps": 1e-6, "rho": 0.05}]
    optimizer = MADA(
        groups, lr=0.25, betas=(0.8, 0.99), bounds={"c": (0.5, 1)}, hyper_clip=2.0, state_dtype=torch.bfloat16
    )
    assert repr(optimizer).splitlines() == [
        "MADA (",
        "Coefficients",
        "    beta1: 0.8 (learned, hyper_lr 0.0005)",
        "    beta2: 0.99",
        "    beta3: 0 (learned, hyper_lr 0.1)",
        "    rho: 1 (learned, hyper_lr 0.1)",
        "    c: 1 (learned, hyper_lr 0.1)",
        "    gamma: 1 (learned, hyper_lr 0.1)",
        "Parameter Group 0",
        "    params: 2",
        "    bounds: {'c': (0.5, 1.0)}",
        "    hyper_clip: 2.0",
        "    lr: 0.25",
        "    state_dtype: torch.bfloat16",
        "    weight_decay: 0.01",
        "Parameter Group 1",
        "    params: 1",
        "    bounds: {'c': (0.5, 1.0)}",
        "    eps: 1e-06",
        "    hyper_clip: 2.0",
        "    lr: 0.5",
        "    rho: 0.05",
        "    state_dtype: torch.bfloat16",
        "    weight_decay: 0.01",
        ")",
    ]


def test_what_is_printed_where_groups_have_betas_of_their_own():
    optimizer = load_optimizer("adam")([{"params": [weight()]}, {"params": [weight()], "betas": (0.5, 0.9)}], lr=0.25)
    assert repr(optimizer).count("beta1: 0.9\n") == repr(optimizer).count("beta1: 0.5\n") == 1
    assert repr(optimizer).startswith("Adam (\nParameter Group 0\n    params: 1\n    lr: 0.25\n    weight_decay: 0.0\n")


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_nothing_internal_is_printed(row: Row):
    optimizer = row([weight()], lr=0.25)
    shown = repr(optimizer)
    for name in (*SET_TENSORS, PREVIOUS_LR, "family", "special", "previous_betas", "tensor", "None"):
        assert name not in shown
    assert "    lr: 0.25\n" in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [("hyper_lr", 0.0), ("hyper_every", 2), ("hyper_momentum", 0.5), ("hyper_delay", 0), ("bounds", (0.0, 1.0))],
)
def test_how_coefficients_are_learned_is_set_in_all_groups_or_in_none(key: str, value: Any):
    params = [weight(), weight()]
    optimizer = MADA([{"params": [param]} for param in params], hyper_warmup=0)
    former = optimizer.param_groups[1][key]
    value = dict.fromkeys(former, value) if isinstance(former, dict) else value
    optimizer.param_groups[1][key] = value
    for param in params:
        param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"{key} of parameter group 1 .*in each of them, or use hyper_per_group=True"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3))
    optimizer.param_groups[0][key] = value
    optimizer.step()


@pytest.mark.parametrize("scale", [None, "2", torch.ones(2)], ids=str)
def test_bad_hyper_grad_scale_changes_nothing(scale):
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    before = copy.deepcopy((optimizer.state_dict()["state"], model.state_dict()))
    optimizer.hyper_grad_scale = scale
    with pytest.raises(TypeError, match="hyper_grad_scale must be a number or a tensor of one element"):
        optimizer.step()
    torch.testing.assert_close((optimizer.state_dict()["state"], model.state_dict()), before, rtol=0, atol=0)
