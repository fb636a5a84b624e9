"""What is saved is all that a resumed run needs: it goes on bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import IDS, TABLE, Net, Row, train
from torch import Tensor, nn

from mada_optim import MADA, HypergradientOptimizer, load_optimizer
from mada_optim.engine.coefficient_set import SET_TENSORS, CoefficientSet

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_same_state(one: HypergradientOptimizer, other: HypergradientOptimizer) -> None:
    torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0, equal_nan=True)
    assert one.coefficients() == other.coefficients()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize("cut", [1, 8])
def test_resume_bit_for_bit_through_a_file(row: Row, dtype, cut, tmp_path):
    whole = Net(dtype)
    optimizer = row(whole.parameters(), lr=5e-3)
    train(whole, optimizer, cut)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(whole, optimizer, 10, first=cut)

    resumed = Net(dtype, seed=1)
    other = row(resumed.parameters(), lr=1.0)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 10, first=cut)
    assert_same(whole, resumed)
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_share_nothing(row: Row, copied):
    model = Net()
    optimizer = row(model.parameters(), lr=5e-3)
    train(model, optimizer, 5)
    twin_model, twin = copied((model, optimizer))
    train(model, optimizer, 5, first=5)
    train(twin_model, twin, 5, first=5)
    assert_same(model, twin_model)
    assert_same_state(optimizer, twin)


def test_loading_aliases_nothing():
    model, other_model = Net(), Net()
    optimizer, other = (MADA(m.parameters(), hyper_warmup=0) for m in (model, other_model))
    train(model, optimizer, 5)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    train(other_model, other, 5)
    torch.testing.assert_close(saved["state"], before["state"], rtol=0, atol=0)
    assert torch.equal(saved["param_groups"][0]["coefficients"], before["param_groups"][0]["coefficients"])


@pytest.mark.parametrize("renewed", ["loaded", "copied"])
def test_loads_again_after_loading_or_copying(renewed):
    """torch's __setstate__, which both call, adds to the defaults."""
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    if renewed == "copied":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, saved)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()


def test_two_groups_and_an_empty_one_share_one_set_after_loading():
    def make(model: Net) -> MADA:
        params = list(model.parameters())
        return MADA([{"params": params[:2]}, {"params": []}, {"params": params[2:], "lr": 0.1}], hyper_warmup=0)

    model, other_model = Net(), Net()
    optimizer, other = make(model), make(other_model)
    train(model, optimizer, 5)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other_model, other)):
        train(m, o, 5, first=5)
    assert_same(model, other_model)
    assert all(g["coefficients"] is other.param_groups[0]["coefficients"] for g in other.param_groups)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p), "of family None, this optimizer of 'MADA'"),
        (lambda p: load_optimizer("adamw")(p), "special"),
        (lambda p: MADA(p, hyper_warmup=0, hyper_per_group=True), "hyper_per_group=True"),
        (lambda p: MADA(list(p)[:-1], hyper_warmup=0), "size of optimizer's group"),
    ],
    ids=["torch", "other-point", "other-sharing", "fewer-parameters"],
)
def test_a_state_that_does_not_fit_changes_nothing(make, message):
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    foreign_model = Net()
    foreign = make(foreign_model.parameters())
    train(foreign_model, foreign, 3)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign.state_dict())
    assert_unchanged(optimizer, before)


def test_a_state_of_another_version_changes_nothing():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    for key in ("hyper_steps", "bounds", "previous_lr"):
        older = copy.deepcopy(before)
        del older["param_groups"][0][key]
        with pytest.raises(ValueError, match=f"no '{key}' in parameter group 0; was it written by another version"):
            optimizer.load_state_dict(older)
        assert_unchanged(optimizer, before)


def test_one_set_of_settings_is_one_after_loading():
    """What is changed in one group's is changed for all, as before."""
    optimizers = [MADA([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]) for _ in range(2)]
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for optimizer in optimizers:
        for key in ("hyper_lr", "bounds"):
            assert optimizer.param_groups[0][key] is optimizer.param_groups[1][key]


def test_coefficients_follow_the_parameters_to_another_device():
    """As when a library moves the model after the optimizer was made. There is no other device than meta here."""
    optimizer = MADA([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)])
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(param.detach().to("meta")) for param in group["params"]]
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    CoefficientSet(optimizer.family, optimizer.param_groups).follow_parameters()
    for key in SET_TENSORS:
        one, other = (group[key] for group in optimizer.param_groups)
        assert one is other
        assert one.device.type == ("cpu" if key == "hyper_steps" else "meta")


def test_the_hypergradients_of_before_are_not_those_of_what_was_loaded():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    assert optimizer.hypergradients() is not None
    optimizer.load_state_dict(saved)
    assert optimizer.hypergradients() is None


def test_parameters_may_have_other_names():
    """They are told apart by their order."""
    model, other_model = Net(), Net(seed=1)
    optimizer = MADA(model.named_parameters(), lr=5e-3, hyper_warmup=0)
    train(model, optimizer, 5)
    other = MADA([(f"renamed.{name}", param) for name, param in other_model.named_parameters()], hyper_warmup=0)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other_model, other)):
        train(m, o, 5, first=5)
    assert_same(model, other_model)
    assert_same_state(optimizer, other)


def test_what_other_libraries_do_to_a_state_dict():
    """Tuples become lists, and empty dicts and what groups without parameters hold are lost."""
    models = [Net(), Net()]
    optimizers = []
    for model in models:
        params = list(model.parameters())
        optimizers.append(MADA([{"params": []}, {"params": params}, {"params": []}], lr=5e-3, hyper_warmup=0))
    train(models[0], optimizers[0], 5)
    models[1].load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(optimizers[0].state_dict())
    groups = saved["param_groups"]
    groups[0], groups[2] = {"params": []}, {"params": []}
    assert groups[1].pop("special") == {}
    groups[1]["bounds"] = {name: list(box) for name, box in groups[1]["bounds"].items()}
    optimizers[1].load_state_dict(saved)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 5, first=5)
    assert_same(*models)
    assert optimizers[0].coefficients() == optimizers[1].coefficients()


@pytest.mark.parametrize("fused", [None, False])
def test_coefficients_in_another_precision_are_loaded_in_that_of_the_device(fused):
    """``torch.load`` followed by a cast of all tensors, or a file from a device without float64."""
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0, fused=fused)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = {key: value for key, value in saved["param_groups"][0].items() if isinstance(value, Tensor)}
    saved["param_groups"][0].update(
        {key: value.float() if value.is_floating_point() else value.int() for key, value in kept.items()}
    )
    optimizer.load_state_dict(saved)
    for key, value in kept.items():
        assert optimizer.param_groups[0][key].dtype == value.dtype, key
    train(model, optimizer, 3, first=3)


@pytest.mark.parametrize("damage", ["shape", "missing", "coefficients"])
def test_a_damaged_state_changes_nothing(damage):
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    if damage == "shape":
        saved["state"][0]["exp_avg"] = torch.zeros(2, 2)
    elif damage == "missing":
        del saved["state"][2]["pending_grad"]
    else:
        saved["param_groups"][0]["coefficients"] = torch.zeros(3)
    with pytest.raises(ValueError, match={"missing": "pending_grad"}.get(damage, damage)):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def assert_unchanged(optimizer: MADA, before: dict) -> None:
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    for group, group_before in zip(after["param_groups"], before["param_groups"], strict=True):
        assert group.keys() == group_before.keys()
        for name, value in group.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, group_before[name]), name


def test_keys_that_a_scheduler_added_need_not_be_in_the_checkpoint():
    model = Net()
    optimizer = MADA(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False)
    optimizer.load_state_dict(saved)
    assert "max_lr" not in optimizer.param_groups[0]


def test_hooks_of_load_state_dict_see_the_whole_state():
    model = Net()
    optimizer = MADA(model.parameters())
    train(model, optimizer, 2)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [7, 7]


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_the_step_with_which_distributed_checkpoints_make_state_changes_nothing_else(row: Row):
    """torch.distributed.checkpoint.state_dict steps once with zero gradients and lr = 0 to get the buffers."""
    plain, touched = Net(), Net()
    optimizer, phantom = row(plain.parameters(), lr=1e-2), row(touched.parameters(), lr=1e-2)
    for param in touched.parameters():
        param.grad = torch.zeros_like(param)
    phantom.param_groups[0]["lr"] = 0.0
    phantom.step()
    assert len(phantom.state) == len(list(touched.parameters()))
    phantom.param_groups[0]["lr"] = 1e-2
    train(plain, optimizer, 10)
    train(touched, phantom, 10)
    assert_same(plain, touched)
    assert_same_state(optimizer, phantom)


def test_a_schedule_that_starts_at_zero_counts_its_first_step():
    """Real gradients at lr = 0 move the buffers, as torch's AdamW does."""
    ours, theirs = Net(), Net()
    for model, make in ((ours, load_optimizer("adamw")), (theirs, torch.optim.AdamW)):
        optimizer = make(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
        for step in range(10):
            train(model, optimizer, 1, first=step)
            schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
