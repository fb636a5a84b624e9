"""Every preset equals an independent implementation over 200 steps, in float64."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import pytorch_optimizer as peers
import torch
from problems import ADAM, IDS, INTERIOR, STARTS, TABLE, Net, Row, loss_of, train
from torch import nn
from twin import Twin

from mada_optim import MADA, OMADA, AVGrad, HypergradientOptimizer, available_optimizers, load_optimizer
from mada_optim.scale.rate import ScaledRate, given_rate

STEPS = 200
# The twin is of MADA's family.
OF_MADA = [row for row in TABLE if issubclass(row.make, (MADA, OMADA))]


def pair() -> tuple[Net, Net]:
    return Net(), Net()


def assert_equal(ours: nn.Module, theirs: nn.Module, atol: float = 1e-10) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=atol)


def train_twin(model: nn.Module, twin: Twin, steps: int) -> None:
    params = list(model.parameters())
    for step in range(steps):
        model.zero_grad()
        loss_of(model, step).backward()
        twin.step([p.grad for p in params])


def twin_of(model: nn.Module, lr: float, q: dict[str, float], **kwargs) -> Twin:
    return Twin([p.data for p in model.parameters()], lr, q, **kwargs)


def two_groups(model: Net) -> list[dict]:
    return [
        {"params": list(model.embedding.parameters()) + list(model.norm.parameters()), "lr": 3e-3, "weight_decay": 0.0},
        {"params": list(model.hidden.parameters()) + list(model.out.parameters())},
    ]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.99, 0.9999)])
def test_adamw_is_torch_adamw_with_two_groups_and_a_scheduler(betas):
    ours, theirs = pair()
    kwargs = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1}
    optimizers = (
        load_optimizer("adamw")(two_groups(ours), **kwargs),
        torch.optim.AdamW(two_groups(theirs), **kwargs),
    )
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in optimizers]
    for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
        for step in range(STEPS):
            train(model, optimizer, 1, first=step)
            scheduler.step()
    assert_equal(ours, theirs)


def test_adam_is_torch_adam():
    ours, theirs = pair()
    train(ours, load_optimizer("adam")(ours.parameters(), lr=1e-2), STEPS)
    train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2), STEPS)
    assert_equal(ours, theirs)


def test_adamw_defaults_are_torch_adamw_defaults():
    ours, theirs = pair()
    train(ours, load_optimizer("adamw")(ours.parameters()), 20)
    train(theirs, torch.optim.AdamW(theirs.parameters()), 20)
    assert_equal(ours, theirs)


def test_maximize_is_torch_adamw_maximize():
    ours, theirs = pair()
    train(ours, load_optimizer("adamw")(ours.parameters(), maximize=True), 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), maximize=True), 50)
    assert_equal(ours, theirs)


def test_yogi_is_the_peer_without_its_initial_accumulator():
    """Yogi as published starts v at 1e-6; the family's buffers start at zero."""
    ours, theirs = pair()
    kwargs = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1}
    train(ours, load_optimizer("yogi")(ours.parameters(), **kwargs), STEPS)
    train(theirs, peers.Yogi(theirs.parameters(), initial_accumulator=0.0, **kwargs), STEPS)
    assert_equal(ours, theirs)


def test_lion_is_the_peer():
    ours, theirs = pair()
    train(ours, load_optimizer("lion")(ours.parameters(), lr=1e-3, weight_decay=0.1, lion_betas=(0.9, 0.99)), STEPS)
    train(theirs, peers.Lion(theirs.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99)), STEPS)
    assert_equal(ours, theirs)


def test_adan_is_the_peer_but_for_the_debiasing_of_n():
    """Adan divides n_t by 1 - β3^t, MADA's family does not: the twin with and without it joins the two."""
    ours, theirs = pair()
    with_debiasing, without = pair()
    q = ADAM | {"beta1": 0.98, "beta3": 0.92, "beta2": 0.99}
    train(ours, load_optimizer("adan")(ours.parameters(), lr=1e-2, weight_decay=0.1), STEPS)
    adan = peers.Adan(theirs.parameters(), lr=1e-2, betas=(0.98, 0.92, 0.99), weight_decay=0.1, weight_decouple=True)
    train(theirs, adan, STEPS)
    train_twin(with_debiasing, twin_of(with_debiasing, 1e-2, q, wd=0.1, adan_debiasing=True), STEPS)
    train_twin(without, twin_of(without, 1e-2, q, wd=0.1), STEPS)
    assert_equal(with_debiasing, theirs)
    assert_equal(ours, without)


@pytest.mark.parametrize("row", [row for row in OF_MADA if not row.learns], ids=lambda row: row.name)
def test_fixed_points_are_the_twin(row: Row):
    ours, slow = pair()
    train(ours, row(ours.parameters(), lr=5e-3, weight_decay=0.1), STEPS)
    train_twin(slow, twin_of(slow, 5e-3, row.q, wd=0.1), STEPS)
    assert_equal(ours, slow)


def test_interior_of_the_family_is_the_twin():
    ours, slow = pair()
    q = dict(INTERIOR)
    config = {"betas": (q["beta1"], q["beta2"]), **{name: q[name] for name in STARTS}}
    train(ours, MADA(ours.parameters(), lr=5e-3, weight_decay=0.1, hyper_lr=0.0, **config), STEPS)
    train_twin(slow, twin_of(slow, 5e-3, q, wd=0.1), STEPS)
    assert_equal(ours, slow)


@pytest.mark.parametrize("row", [row for row in OF_MADA if row.learns], ids=lambda row: row.name)
def test_learning_is_the_twin_moved_along_the_recorded_coefficients(row: Row):
    """The deferred buffers of the engine give the same path as a twin told the coefficients of each step."""
    ours, slow = pair()
    optimizer = row(ours.parameters(), lr=5e-3, weight_decay=0.1)
    twin = twin_of(slow, 5e-3, row.q, wd=0.1)
    start = optimizer.coefficients()
    for step in range(100):
        train(ours, optimizer, 1, first=step)
        twin.q = optimizer.coefficients()
        slow.zero_grad()
        loss_of(slow, step).backward()
        twin.step([p.grad for p in slow.parameters()])
    assert_equal(ours, slow)
    assert optimizer.coefficients() != start


def test_frozen_config_repeats_a_training_with_what_it_found():
    model = Net()
    first = MADA(model.parameters(), lr=5e-3, hyper_warmup=0)
    train(model, first, 30)
    again = MADA(Net().parameters(), lr=5e-3, **first.frozen_config())
    assert again.coefficients() == first.coefficients()
    assert all(alpha == 0.0 for alpha in again.param_groups[0]["hyper_lr"].values())


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_frozen_config_is_for_an_optimizer_of_the_same_class(row: Row):
    optimizer = row(Net().parameters(), lr=1e-3)
    again = type(optimizer)(Net().parameters(), **optimizer.frozen_config())
    assert again.coefficients() == optimizer.coefficients()


def test_freeze_holds_the_coefficients_and_releases_what_learning_needs():
    ours, slow = pair()
    optimizer = MADA(ours.parameters(), lr=5e-3, hyper_warmup=0)
    twin = twin_of(slow, 5e-3, optimizer.coefficients(), wd=1e-2)
    held = None
    for step in range(60):
        if step == 30:
            optimizer.freeze()
            held = optimizer.coefficients()
            assert all("pending_grad" not in optimizer.state[p] for p in ours.parameters())
        train(ours, optimizer, 1, first=step)
        twin.q = optimizer.coefficients()
        slow.zero_grad()
        loss_of(slow, step).backward()
        twin.step([p.grad for p in slow.parameters()])
    assert_equal(ours, slow)
    assert optimizer.coefficients() == held


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_memory_is_what_the_coefficients_need(row: Row):
    model = Net(torch.float32)
    optimizer = row(model.parameters(), lr=1e-3)
    train(model, optimizer, 2)
    for param, state in optimizer.state.items():
        sizes = [t for t in state.values() if t.shape == param.shape and t.dim() > 0]
        assert len(sizes) == row.buffers
        assert all(t.dtype == torch.float32 for t in sizes)


def test_names():
    assert set(available_optimizers()) == {row.name for row in TABLE} - {"mada-every-3"}
    assert load_optimizer("avgrad") is AVGrad
    weight = [torch.nn.Parameter(torch.zeros(2))]
    step_sizes = MADA(weight).param_groups[0]["hyper_lr"]
    assert step_sizes["beta2"] == 0.0
    papers = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
    assert load_optimizer("mada-paper")(weight).param_groups[0]["hyper_lr"] == dict.fromkeys(ADAM, 0.0) | papers
    with pytest.raises(ValueError, match="adamw.*got 'sgd'"):
        load_optimizer("sgd")


# Arguments that a group keeps in another form, or whose name means something else there.
NOT_IN_GROUPS = ("params", "hyper_lr", "bounds", "betas", "matrices", "split")


@pytest.mark.parametrize("name", available_optimizers())
def test_every_named_optimizer_is_a_class(name: str):
    """As everything that takes an optimizer expects: its name, what it is a subclass of, pickling, its signature."""
    make = load_optimizer(name)
    assert isinstance(make, type)
    assert issubclass(make, HypergradientOptimizer)
    assert make.__name__.lower() == name.replace("-", "")
    assert make.__doc__
    assert pickle.loads(pickle.dumps(make)) is make
    model = Net()
    optimizer = make(model, 2e-3, scale=False) if name == "omada" else make(model.parameters(), 2e-3)
    assert type(optimizer) is make
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3] * len(optimizer.param_groups)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert type(copied) is make
    assert copied.coefficients() == optimizer.coefficients()
    again = make(model if name == "omada" else model.parameters(), **optimizer.frozen_config())
    assert again.coefficients() == optimizer.coefficients()
    for argument in inspect.signature(make).parameters.values():
        if argument.name in again.param_groups[0] and argument.name not in NOT_IN_GROUPS:
            assert given_rate_or(again.param_groups[0][argument.name]) == argument.default


def given_rate_or(value: object) -> object:
    """The rate that was given, where a value is a learning rate that shows another."""
    return given_rate(value) if isinstance(value, ScaledRate) else value


@pytest.mark.parametrize("name", [row.name for row in OF_MADA if row.name in available_optimizers()])
def test_positions_of_arguments_are_those_of_adamw(name: str):
    optimizer = load_optimizer(name)([nn.Parameter(torch.zeros(2))], 2e-3, (0.8, 0.95), 1e-6, 0.3)
    (group,) = optimizer.param_groups
    assert (given_rate_or(group["lr"]), group["eps"], group["weight_decay"]) == (2e-3, 1e-6, 0.3)
    coefficients = optimizer.coefficients()
    assert (coefficients["beta1"], coefficients["beta2"]) == (0.8, 0.95)
    with pytest.raises(TypeError, match=r"\.__init__\(\) got an unexpected keyword argument 'amsgrad'"):
        load_optimizer(name)([nn.Parameter(torch.zeros(2))], amsgrad=True)


def test_a_point_of_ones_own_is_a_class_statement():
    class Slow(MADA, lr=1e-5, hyper_lr=0.0):
        """Steps that nobody sees."""

    assert Slow([nn.Parameter(torch.zeros(2))]).param_groups[0]["lr"] == 1e-5
    assert "slow" not in available_optimizers()
    with pytest.raises(TypeError, match="no argument 'gama'"):

        class Mistyped(MADA, gama=0.0):
            pass


def test_avgrad_takes_what_its_documentation_says():
    model = Net()
    optimizer = AVGrad(model.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert optimizer.coefficients() == ADAM | {"beta1": 0.8, "beta2": 0.9, "rho": 0.0}
    copied = copy.deepcopy(optimizer)
    assert copied.coefficients() == optimizer.coefficients()
