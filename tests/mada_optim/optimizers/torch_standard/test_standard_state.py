"""What torch demands of its own optimizers: state dicts, pickles, and hooks of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from standard import (
    CPU,
    Optimizer,
    Options,
    every_implementation,
    every_optimizer,
    options,
    same,
    some_steps,
    weight_and_bias,
)
from torch.nn import Parameter
from torch_database import LATER_ARGUMENTS, inputs

from mada_optim import HypergradientOptimizer


def primed(
    optimizer: Optimizer, kwargs: Options, named: bool = False
) -> tuple[list[Parameter], HypergradientOptimizer]:
    torch.manual_seed(0)
    params = weight_and_bias()
    optim = optimizer([(f"name{i}", p) for i, p in enumerate(params)] if named else params, **kwargs)
    some_steps(params, optim, 6)
    return params, optim


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@every_implementation("differentiable", "capturable")
def test_state_dict_is_deterministic(optimizer: Optimizer, implementation, named):
    for given in ("tensor lr",) if any(named) else inputs(CPU):
        params, optim = primed(optimizer, options(given, implementation), named[0])
        copies = [Parameter(param.detach().clone()) for param in params]
        taken = [(f"name{i}", p) for i, p in enumerate(copies)] if named[1] else copies
        other = optimizer(taken, **options(given, implementation))
        saved = optim.state_dict()
        kept = copy.deepcopy(saved)
        other.load_state_dict(saved)
        assert same(saved, kept)
        some_steps(params, optim, 3)
        some_steps(copies, other, 3)
        assert same(params, copies)
        ours, theirs = optim.state_dict(), other.state_dict()
        names = [state["param_groups"][0].pop("param_names", None) for state in (ours, theirs)]
        assert same(ours, theirs)
        assert names[1] == (["name0", "name1"] if any(named) else None)
        # A parameter that is listed again has the same number.
        other.param_groups.extend(other.param_groups)
        groups = other.state_dict()["param_groups"]
        assert groups[0]["params"] == groups[1]["params"]


@every_implementation("differentiable")
def test_state_from_before_some_arguments_existed_is_loaded(optimizer: Optimizer, implementation):
    params, optim = primed(optimizer, options("no weight decay", implementation))
    old = copy.deepcopy(optim.state_dict())
    for group in old["param_groups"]:
        for name in LATER_ARGUMENTS:
            del group[name]
    for state in old["state"].values():
        state["step"] = float(state["step"])  # which was no tensor then
    optim.load_state_dict(old)
    fresh = optimizer([Parameter(torch.ones(1))])
    for name in LATER_ARGUMENTS:
        assert optim.param_groups[0][name] == fresh.param_groups[0][name]
    assert all(state["step"] == torch.tensor(6.0) for state in optim.state.values())
    some_steps(params, optim)
    assert all(state["step"] == torch.tensor(10.0) for state in optim.state.values())


@every_optimizer
def test_an_optimizer_pickled_before_some_arguments_existed_is_loaded(optimizer: Optimizer):
    params, optim = primed(optimizer, {})
    old = copy.deepcopy(optim.__getstate__())
    for given in (old["defaults"], *old["param_groups"]):
        for name in LATER_ARGUMENTS:
            del given[name]
    renewed = optimizer.__new__(optimizer)
    renewed.__setstate__(old)
    some_steps(params, optim)
    copies = renewed.param_groups[0]["params"]
    some_steps(copies, renewed)
    assert same(params, copies)
    renewed.add_param_group({"params": [Parameter(torch.zeros(2))]})


@every_implementation("differentiable")
def test_state_dict_is_loaded_from_a_file_as_it_was(optimizer: Optimizer, implementation):
    for given in ("no weight decay", "maximize", "tensor lr"):
        saved = primed(optimizer, options(given, implementation))[1].state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        assert same(torch.load(file, weights_only=True), saved)


@every_implementation()
def test_hooks_of_state_dict(optimizer: Optimizer, implementation):
    optim = optimizer([torch.ones(2)], **implementation)
    optim.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
    assert optim.state_dict()["state"]["test"] == 1

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "found": state["state"].pop("test")}

    optim.register_state_dict_post_hook(replace)
    state = optim.state_dict()
    assert state["found"] == 1
    assert not state["state"]


@every_implementation()
def test_hooks_of_load_state_dict(optimizer: Optimizer, implementation):
    optim = optimizer([torch.ones(2)], **implementation)

    def change(_: Any, state: dict[str, Any]) -> None:
        state["param_groups"][0]["lr"] = 0.002

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    optim.register_load_state_dict_pre_hook(change)
    optim.register_load_state_dict_post_hook(lambda o: o.state.update(lr=o.param_groups[0]["lr"]))
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.002
    optim.register_load_state_dict_pre_hook(replace, prepend=True)
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.002
    optim.register_load_state_dict_pre_hook(replace)
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.003


@every_optimizer
def test_state_that_is_no_parameters_is_loaded_too(optimizer: Optimizer):
    _, optim = primed(optimizer, {})
    optim.state["note"] = 7
    other = optimizer(weight_and_bias())
    other.load_state_dict(optim.state_dict())
    assert other.state["note"] == 7
    assert len(other.state) == 3


@every_optimizer
def test_deepcopy_has_all_public_attributes(optimizer: Optimizer):
    _, optim = primed(optimizer, {})
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (optim, copy.deepcopy(optim))]
    assert public[0] == public[1] >= {"defaults", "state", "param_groups", "family"}
