"""Which parameters OMADA takes for matrices: those of the model, of marked groups, and of groups that come later."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from problems import Deep, loss_of, train
from torch import nn

from mada_optim import OMADA, matrix_parameters

MISSING = r"no parameter group has matrices=True.*OMADA\(model\).*integrations.transformers.OMADATrainer"


def names_of_matrices(optimizer: Any) -> set[str]:
    return {name for group in optimizer.param_groups if group["matrices"] for name in group["param_names"]}


@pytest.mark.parametrize("kind", ["parameters", "named parameters", "groups", "Trainer's"])
def test_parameters_without_a_mark_are_warned_of_once_at_the_users_line(kind: str):
    model = Deep()
    params = {
        "parameters": model.parameters(),
        "named parameters": model.named_parameters(),
        "groups": [{"params": model.hidden.parameters()}, {"params": model.out.weight}],
        "Trainer's": [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == wanted]} for wanted in (True, False)
        ],
    }[kind]
    with pytest.warns(UserWarning, match=MISSING) as caught:
        optimizer = OMADA(params)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    train(model, optimizer, 2)


def test_what_is_said_to_have_no_matrices_is_not_warned_of():
    model = Deep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OMADA(model)
        OMADA([model.out.bias, model.hidden[0].bias])
        OMADA([{"params": model.parameters(), "matrices": False}])
        OMADA([{"params": model.hidden[0].weight, "matrices": True}, {"params": model.out.parameters()}])
        OMADA(OMADA(model).param_groups)
        OMADA(nn.Linear(4, 3))


@pytest.mark.parametrize("matrices", [{}, {"matrices": True}], ids=["alone", "with matrices"])
def test_groups_written_for_muon(matrices: dict[str, bool]):
    model, twin = Deep(), Deep()
    hidden = [set(matrix_parameters(net)) for net in (model, twin)]
    groups = [
        {"params": [p for p in model.parameters() if p in hidden[0]], "use_muon": True, **matrices},
        {"params": [p for p in model.parameters() if p not in hidden[0]], "use_muon": False, "betas": (0.9, 0.95)},
    ]
    optimizer, other = OMADA(groups, ortho=0.5), OMADA(twin, ortho=0.5)
    other.param_groups[1]["betas"] = (0.9, 0.95)
    assert [group["matrices"] for group in optimizer.param_groups] == [True, False]
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, 5)
    for own, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_marks_that_make_no_sense():
    matrix = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="matrices=False and use_muon=True contradict each other"):
        OMADA([{"params": matrix, "use_muon": True, "matrices": False}])
    with pytest.raises(ValueError, match="use_muon of a parameter group must be a bool, got 'yes'"):
        OMADA([{"params": matrix, "use_muon": "yes"}])
    with pytest.raises(ValueError, match="real tensors of 2 or more dimensions"):
        OMADA([{"params": nn.Parameter(torch.ones(2)), "use_muon": True}])


def partly_frozen() -> tuple[Deep, OMADA]:
    model = Deep()
    model.hidden.requires_grad_(False)
    optimizer = OMADA(model, ortho=0.3, hyper_lr={"ortho": 0.1}, scale=False)
    assert names_of_matrices(optimizer) == {"convolution.weight"}
    return model, optimizer


@pytest.mark.parametrize("named", [False, True])
def test_layers_that_are_unfrozen_are_known(named: bool):
    model, optimizer = partly_frozen()
    train(model, optimizer, 3)
    model.hidden.requires_grad_(True)
    added = model.hidden.named_parameters("hidden") if named else model.hidden.parameters()
    optimizer.add_param_group({"params": added, "lr": 1e-3})
    assert names_of_matrices(optimizer) == names_of_matrices(OMADA(model))
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3, 1e-3, 1e-3]
    assert [group["matrices"] for group in optimizer.param_groups] == [True, False, False, True]
    before = copy.deepcopy(model.hidden.state_dict())
    train(model, optimizer, 3, first=3)
    assert all("ortho" in optimizer.state[param] for param in optimizer.param_groups[-1]["params"])
    assert not any(torch.equal(value, before[name]) for name, value in model.hidden.state_dict().items())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_know_the_matrices_of_their_model(way: str):
    if way == "deepcopy":
        model, optimizer = copy.deepcopy(partly_frozen())
    elif way == "pickle":
        model, optimizer = pickle.loads(pickle.dumps(partly_frozen()))
    else:
        file = io.BytesIO()
        torch.save(partly_frozen(), file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=False)
    model.hidden.requires_grad_(True)
    optimizer.add_param_group({"params": model.hidden.parameters()})
    assert names_of_matrices(optimizer) == names_of_matrices(OMADA(model))
    train(model, optimizer, 2)


def test_other_parameters_may_come_later_too():
    model, optimizer = partly_frozen()
    head = nn.Linear(6, 3)
    with pytest.warns(UserWarning, match=MISSING) as caught:
        optimizer.add_param_group({"params": head.parameters()})
    assert caught[0].filename == __file__
    assert optimizer.param_groups[-1]["param_names"] == ["param_groups.2.0", "param_groups.2.1"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], "matrices": True})
    assert [group["matrices"] for group in optimizer.param_groups] == [True, False, False, True]
    count = len(optimizer.param_groups)
    for bad in (
        {"params": [*model.hidden.parameters(), model.convolution.weight]},  # its second half is there already
        {"params": model.hidden.parameters(), "lr": -1.0},
        {"param": []},
        [model.hidden],
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == count
    loss_of(model, 0).backward()
    optimizer.step()
