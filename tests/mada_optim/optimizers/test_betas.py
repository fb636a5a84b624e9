"""The betas of a parameter group: AdamW's where they are not learned, refused by name where they are."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from problems import Net, loss_of, train
from test_presets import assert_equal, pair
from torch import nn
from torch.optim import lr_scheduler

from mada_optim import MADA, OMADA, AVGrad, HypergradientOptimizer, load_optimizer
from mada_optim.scale.rate import given_rate

REFUSED = "betas of a parameter group cannot be set.*beta1 is learned; pass cycle_momentum=False"
# How a step is carried out: in C++, with torch's operators, compiled, and with what CUDA graphs need.
PATHS = [{}, {"fused": False}, {"foreach": False}, {"fused": True, "capturable": True}]
CYCLES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "one for each group": lambda o: lr_scheduler.OneCycleLR(
        o, [1e-2, 3e-3], total_steps=30, base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.95]
    ),
}


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def halves(model: Net, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> list[dict]:
    params = list(model.parameters())
    return [{"params": params[:3], **(first or {})}, {"params": params[3:], **(second or {})}]


def cycle(model: Net, optimizer: torch.optim.Optimizer, schedule: Any, steps: int = 20, first: int = 0) -> None:
    for step in range(first, first + steps):
        train(model, optimizer, 1, first=step)
        schedule.step()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", CYCLES)
def test_schedules_cycle_the_momentum_as_they_do_adamws(name: str, path: dict[str, Any]):
    ours, theirs = pair()
    optimizers = load_optimizer("adamw")(halves(ours), lr=1e-2, **path), torch.optim.AdamW(halves(theirs), lr=1e-2)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        cycle(model, optimizer, CYCLES[name](optimizer))
    assert_equal(ours, theirs)
    for own, other in zip(*(o.param_groups for o in optimizers), strict=True):
        assert own["betas"] == other["betas"] != (0.9, 0.999)
    assert optimizers[0].coefficients(1)["beta1"] == optimizers[0].param_groups[1]["betas"][0]


@pytest.mark.parametrize("path", PATHS[:3], ids=str)
def test_betas_written_by_hand_are_those_of_the_next_step(path: dict[str, Any]):
    ours, theirs = pair()
    optimizers = load_optimizer("adamw")(halves(ours), **path), torch.optim.AdamW(halves(theirs))
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, 3)
        optimizer.param_groups[1]["betas"] = (0.5, 0.9)
        train(model, optimizer, 3, first=3)
        for group in optimizer.param_groups:
            group["betas"] = [0.7, 0.99]
        train(model, optimizer, 3, first=6)
    assert_equal(ours, theirs)
    assert optimizers[0].coefficients() == optimizers[0].coefficients(1)


def test_betas_are_used_with_learned_coefficients_of_another_kind():
    """A step that waits for its hypergradient is settled with its own betas: the path is that of a twin without any."""
    paths = []
    for every in (1, 1000):  # 1000: nothing waits, and nothing is learned
        model = Net()
        optimizer = MADA(halves(model), hyper_lr={"rho": 1e-300}, hyper_warmup=0, hyper_every=every)
        cycle(model, optimizer, CYCLES["one for each group"](optimizer))
        paths.append(model)
    assert_equal(*paths, atol=1e-15)


def test_beta1_is_cycled_where_beta2_is_learned():
    model = Net()
    optimizer = MADA(model.parameters(), betas=(0.9, 0.99), hyper_lr={"beta2": 1e-2}, hyper_warmup=0)
    cycle(model, optimizer, CYCLES["OneCycleLR"](optimizer))
    (group,) = optimizer.param_groups
    assert group["betas"] == (optimizer.coefficients()["beta1"], None)
    assert optimizer.coefficients()["beta2"] != 0.99
    group["betas"] = (0.9, 0.99)
    with pytest.raises(ValueError, match="beta2 is learned"):
        optimizer.step()


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("make", [MADA, load_optimizer("hyperadam"), load_optimizer("mada-paper")])
def test_schedules_are_told_what_to_pass_where_beta1_is_learned(make: Any, name: str):
    optimizer = make(Net().parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=REFUSED):
        CYCLES[name](optimizer)


def test_betas_that_are_learned_can_be_read_and_not_written():
    model = Net()
    optimizer = MADA(halves(model), hyper_warmup=0)
    train(model, optimizer, 5)
    for group in optimizer.param_groups:
        assert group["betas"] == tuple(optimizer.coefficients()[name] for name in ("beta1", "beta2")) != (0.9, 0.999)
        assert "betas" not in group
        with pytest.raises(ValueError, match=REFUSED):
            group["betas"] = (0.9, 0.95)
        with pytest.raises(KeyError, match="alphas"):
            group["alphas"]
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    dict.update(optimizer.param_groups[1], betas=(0.5, 0.5))  # in a way that is not seen at once
    with pytest.raises(ValueError, match=REFUSED):
        optimizer.step()
    dict.pop(optimizer.param_groups[1], "betas")
    torch.testing.assert_close((optimizer.state_dict()["state"], model.state_dict()), (before[0]["state"], before[1]))


@pytest.mark.parametrize("betas", [(0.9, 1.0), (0.9,), 0.9, None, (0.9, 0.9, 0.9), ("a", 0.9)], ids=str)
def test_bad_betas_in_a_group_change_nothing(betas: Any):
    model = Net()
    optimizer = AVGrad(halves(model))
    train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1]["betas"] = betas
    with pytest.raises(ValueError, match=r"betas must be two numbers|beta. must be a number in \[0.0"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Betas with which a group comes.


@pytest.mark.parametrize("make", [MADA, AVGrad, OMADA, load_optimizer("hyperadam")])
def test_a_group_may_name_the_betas_that_all_share(make: Any):
    defaults = make([weight()]).coefficients()
    betas = [defaults["beta1"], defaults["beta2"]]
    optimizer = make([{"params": [weight()], "betas": betas}, {"params": [weight()]}])
    assert optimizer.coefficients(0) == optimizer.coefficients(1) == defaults


def test_groups_may_differ_in_betas_where_they_are_not_learned():
    ours, theirs = pair()
    different = {"betas": (0.5, 0.9)}, {"betas": (0.8, 0.95)}
    optimizer = load_optimizer("adamw")(halves(ours, *different), lr=1e-2)
    train(ours, optimizer, 20)
    train(theirs, torch.optim.AdamW(halves(theirs, *different), lr=1e-2), 20)
    assert_equal(ours, theirs)
    assert [optimizer.coefficients(index)["beta1"] for index in (0, 1)] == [0.5, 0.8]
    with pytest.raises(
        ValueError, match=r"sets 'betas' to \(0.5, 0.9\).*\(0.9, 0.999\).*hyper_per_group=True.*hyper_lr"
    ):
        MADA(halves(Net(), *different))
    with pytest.raises(ValueError, match=r"sets 'betas' to \(0.9, 0.95\)"):
        MADA(halves(Net(), {"betas": (0.9, 0.95)}))  # β2 alone differs, which is not learned, but goes with β1
    of_second = {"hyper_lr": {"beta2": 1e-3}}
    assert MADA(halves(Net(), {"betas": (0.5, 0.999)}), **of_second).coefficients(0)["beta1"] == 0.5
    with pytest.raises(ValueError, match=r"sets 'betas' to \(0.9, 0.95\)"):
        MADA(halves(Net(), {"betas": (0.9, 0.95)}), **of_second)


@pytest.mark.parametrize("make", [MADA, AVGrad, OMADA])
def test_groups_of_another_optimizer_are_taken(make: Any):
    model, options = Net(), {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.2}
    for other in (torch.optim.AdamW(halves(model), **options), make(halves(model), **options)):
        optimizer = make(other.param_groups, betas=(0.8, 0.95))
        assert [given_rate(group["lr"]) for group in optimizer.param_groups] == [3e-3, 3e-3]
        assert optimizer.coefficients()["beta1"] == 0.8
        train(model, optimizer, 2)
        optimizer.load_state_dict(make(optimizer.param_groups, betas=(0.8, 0.95)).state_dict())
    settings = {"hyper_lr": 0.1, "bounds": {"rho": (0.5, 1.0)}, "hyper_clip": 1.0}
    MADA(MADA(halves(model), **settings).param_groups, **settings)
    with pytest.raises(ValueError, match="sets 'hyper_lr' to"):
        MADA(MADA(halves(model), hyper_lr=0.1).param_groups)
    fixed = load_optimizer("adamw")(torch.optim.AdamW(halves(model), betas=(0.7, 0.9)).param_groups)
    assert fixed.coefficients(1)["beta1"] == 0.7


@pytest.mark.parametrize("make", [MADA, AVGrad, OMADA])
def test_adamw_takes_our_groups(make: Any):
    model, twin = Net(), Net()
    optimizer = torch.optim.AdamW(make(halves(model), lr=3e-3, betas=(0.9, 0.99)).param_groups, betas=(0.9, 0.99))
    other = torch.optim.AdamW(halves(twin), lr=3e-3, betas=(0.9, 0.99))
    for one, its in ((model, optimizer), (twin, other)):
        cycle(one, its, CYCLES["OneCycleLR"](its), 5)
    assert_equal(model, twin)
    assert copy.deepcopy(optimizer).param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


@pytest.mark.parametrize("make", [AVGrad, load_optimizer("adamw"), torch.optim.AdamW])
def test_a_group_without_betas_has_the_optimizers(make: Any):
    """Whatever the first group has, from the start or since."""
    optimizer = make([{"params": [weight()], "betas": (0.5, 0.9)}, {"params": [weight()]}], betas=(0.8, 0.9))
    optimizer.param_groups[0]["betas"] = (0.7, 0.9)
    optimizer.add_param_group({"params": [weight()]})
    optimizer.add_param_group({"params": [weight()], "betas": (0.6, 0.9)})
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.7, 0.8, 0.8, 0.6]


def test_a_group_that_comes_after_a_freeze_has_what_was_learned():
    optimizer = MADA([param := weight()], hyper_warmup=0)
    for _ in range(5):
        param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.freeze()
    optimizer.add_param_group({"params": [weight()]})
    first, later = (group["betas"] for group in optimizer.param_groups)
    assert first == later != (0.9, 0.999)


@pytest.mark.parametrize("saved", [False, True])
def test_learning_again_right_after_a_freeze(saved: bool):
    optimizer = MADA([param := weight()], hyper_warmup=0)
    step_sizes = dict(optimizer.param_groups[0]["hyper_lr"])
    for _ in range(5):
        param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.freeze()
    if saved:
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = MADA([param], hyper_warmup=0)
        optimizer.load_state_dict(state)
    frozen = optimizer.coefficients()["beta1"]
    optimizer.param_groups[0]["hyper_lr"] = step_sizes
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.coefficients()["beta1"] != frozen


def test_different_betas_are_not_learned():
    optimizer = AVGrad([{"params": [weight()], "betas": (0.5, 0.999)}, {"params": [weight()]}])
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    for group in optimizer.param_groups:
        group["hyper_lr"] = {**group["hyper_lr"], "beta1": 1e-3}
    with pytest.raises(ValueError, match="betas of parameter group 1 are .* and those of group 0"):
        optimizer.step()


def test_lion_has_no_betas():
    """They would change nothing, so they are refused, and schedulers find none to cycle."""
    make = load_optimizer("lion")
    optimizer = make(torch.optim.AdamW([weight()]).param_groups)
    assert dict(optimizer.param_groups[0]).get("betas") is None
    with pytest.raises(ValueError, match="have no effect where gamma is frozen at 0: use lion_betas"):
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with pytest.raises(ValueError, match="have no effect where gamma is frozen at 0: use lion_betas"):
        make([{"params": [weight()], "betas": (0.5, 0.9)}])
    with pytest.raises(ValueError, match="support momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)


# Where learning stops and begins.


@pytest.mark.parametrize("by_hand", [False, True])
def test_groups_have_betas_once_learning_has_stopped(by_hand: bool):
    model = Net()
    optimizer = MADA(halves(model), hyper_warmup=0)
    train(model, optimizer, 5)
    step_sizes = optimizer.param_groups[0]["hyper_lr"]
    if by_hand:
        for group in optimizer.param_groups:
            group["hyper_lr"] = dict.fromkeys(step_sizes, 0.0)
    else:
        optimizer.freeze()
    before = optimizer.coefficients()
    schedule = lr_scheduler.OneCycleLR(optimizer, 1e-2, 20, max_momentum=0.97)
    assert optimizer.coefficients() == {**before, "beta1": 0.97}
    cycle(model, optimizer, schedule, 5, first=5)
    for group in optimizer.param_groups:
        group["hyper_lr"] = step_sizes
    with pytest.raises(ValueError, match=REFUSED):
        optimizer.step()  # the schedule has written betas since the last step
    for group in optimizer.param_groups:
        group["betas"] = group["previous_betas"]
    begins = optimizer.coefficients()["beta1"]
    train(model, optimizer, 1, first=10)
    assert "betas" not in optimizer.param_groups[0]
    train(model, optimizer, 2, first=11)
    assert optimizer.coefficients()["beta1"] == pytest.approx(begins, abs=0.02)
    assert optimizer.coefficients()["beta1"] != begins


# Saving and loading.


@pytest.mark.parametrize("options", [{}, {"hyper_lr": {"rho": 0.1}, "hyper_warmup": 0}], ids=["fixed", "learned"])
def test_cycled_betas_resume_bit_for_bit(options: dict[str, Any]):
    def make() -> tuple[Net, HypergradientOptimizer, Any]:
        model = Net()
        optimizer = MADA(halves(model), **{"hyper_lr": 0.0, **options})
        return model, optimizer, CYCLES["one for each group"](optimizer)

    whole = make()
    cycle(*whole, 7)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    file.seek(0)
    cycle(*whole, 7, first=7)
    resumed = make()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    cycle(*resumed, 7, first=7)
    assert_equal(whole[0], resumed[0], atol=0)
    assert whole[1].coefficients(1) == resumed[1].coefficients(1)


@pytest.mark.parametrize("make", [MADA, AVGrad])
def test_a_checkpoint_from_before_groups_had_betas_is_loaded(make: Any):
    model = Net()
    optimizer = make(halves(model), betas=(0.8, 0.9))
    train(model, optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group.pop("betas", None)
        group.pop("previous_betas", None)
    twin = copy.deepcopy(model)
    resumed = make(halves(twin))
    resumed.load_state_dict(old)
    assert resumed.coefficients() == optimizer.coefficients()
    for one, other in ((model, optimizer), (twin, resumed)):
        train(one, other, 3, first=3)
    assert_equal(model, twin, atol=0)
    assert [sorted(group) for group in resumed.param_groups] == [sorted(group) for group in optimizer.param_groups]


@pytest.mark.parametrize("make", [MADA, AVGrad])
def test_betas_of_copies(make: Any):
    model = Net()
    optimizer = make(halves(model))
    train(model, optimizer, 2)
    for copied in (copy.deepcopy(optimizer), torch.load(_saved(optimizer), weights_only=False)):
        assert copied.param_groups[1]["betas"] == optimizer.param_groups[1]["betas"]
        assert type(copied.param_groups[0]) is type(optimizer.param_groups[0])
        loss_of(model, 0)
        copied.step()


def _saved(optimizer: HypergradientOptimizer) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return file
