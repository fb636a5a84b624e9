"""OMADA: its corners are torch.optim.Muon and MADA, its hypergradients are derivatives, and it finds its way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import Deep, Net, loss_of, train
from torch import nn

import mada_optim.matrices.directions
from mada_optim import MADA, OMADA, OMADAFamily, matrix_groups, matrix_parameters, orthogonalize

ADAMW = {"hyper_lr": 0.0}


def test_at_one_corner_it_is_torchs_muon(monkeypatch):
    """Compared step by step from the same weights: Newton-Schulz in bfloat16 would drift apart in many steps.

    In bfloat16, as torch's: its rounding moves small singular values by a tenth.
    """
    monkeypatch.setattr(mada_optim.matrices.directions, "working_dtype", lambda _: torch.bfloat16)
    ours = Deep()
    groups = matrix_groups(ours)
    optimizer = OMADA(ours, lr=1e-2, weight_decay=0.1, scale=False)
    assert len(groups[0]["params"]) == 5
    matrices = [param for _, param in groups[0]["params"]]
    twins = [nn.Parameter(param.detach().flatten(1).clone()) for param in matrices]
    muon = torch.optim.Muon(twins, 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        for param, twin in zip(matrices, twins, strict=True):
            twin.data.copy_(param.detach().flatten(1))
        optimizer.zero_grad()
        loss_of(ours, step).backward()
        for param, twin in zip(matrices, twins, strict=True):
            twin.grad = param.grad.flatten(1).clone()
        before = [param.detach().flatten(1).clone() for param in matrices]
        optimizer.step()
        muon.step()
        for param, twin, old in zip(matrices, twins, before, strict=True):
            moved, theirs = param.detach().flatten(1) - old, twin.detach() - old
            # The last bits of bfloat16, of a step of about lr.
            torch.testing.assert_close(moved, theirs, rtol=0.0, atol=1e-2 * 2**-6)
    state = optimizer.state[matrices[0]]
    assert {name for name, value in state.items() if value.dim()} == {"ortho_exp_avg", "ortho"}


def test_at_the_other_corner_it_is_mada():
    ours, theirs = Deep(torch.float64), Deep(torch.float64)
    settings = {"hyper_lr": {"beta1": 5e-4, "rho": 0.1}, "hyper_warmup": 2, "betas": (0.9, 0.99), "lr": 1e-2}
    train(ours, OMADA(ours, **settings, ortho=0.0, scale=False), 30)
    train(theirs, MADA(theirs.parameters(), **settings, hyper_delay=0), 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_orthogonalize_has_the_singular_vectors_and_nearly_equal_values():
    torch.manual_seed(0)
    for shape in ((16, 16), (8, 32), (32, 8), (8, 4, 3)):
        matrix = torch.randn(shape)
        (found,) = orthogonalize([matrix])
        flat = found.flatten(1) / (0.2 * max(matrix.flatten(1).shape) ** 0.5)
        u, _, vh = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
        inner = u.mT @ flat @ vh.mT
        assert inner.diagonal().min() > 0.5
        assert inner.diagonal().max() < 1.3
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4


def test_orthogonalize_of_zero_is_zero():
    assert orthogonalize([torch.zeros(3, 4)])[0].abs().max() == 0


def test_hypergradients_equal_finite_differences():
    """Of the loss after a step in which one coefficient is moved."""
    start = {
        "betas": (0.8, 0.9),
        "beta3": 0.2,
        "rho": 0.4,
        "c": 0.6,
        "gamma": 0.7,
        "ortho": 0.3,
        "row_norm": 0.4,
        "scale": False,
        "lr": 1e-2,
    }
    last, names = 5, [c.name for c in OMADAFamily.coefficients]
    model = Deep(torch.float64)
    learning = OMADA(model, **start, hyper_lr=dict.fromkeys(names, 1e-300))
    train(model, learning, last + 2)

    def loss_with(index: int, shift: float) -> float:
        other = Deep(torch.float64)
        optimizer = OMADA(other, **start, hyper_lr=0.0)
        train(other, optimizer, last)
        optimizer.param_groups[0]["coefficients"][index] += shift
        train(other, optimizer, 1, first=last)
        return loss_of(other, last + 1).item()

    h = 1e-5
    for index, name in enumerate(names):
        hypergradient = learning.hypergradients()[name]
        difference = (loss_with(index, h) - loss_with(index, -h)) / (2 * h)
        assert hypergradient == pytest.approx(difference, rel=1e-5), name


def test_resumes_bit_for_bit():
    whole, cut = Deep(), Deep()
    train(whole, (of_whole := OMADA(whole)), 20)
    train(cut, (optimizer := OMADA(cut)), 10)
    other = Deep()
    other.load_state_dict(cut.state_dict())
    resumed = OMADA(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, resumed, 10, first=10)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert of_whole.coefficients() == resumed.coefficients()


def test_only_matrices_keep_what_matrices_need():
    model = Deep()
    optimizer = OMADA(model, hyper_lr={"ortho": 0.1})
    train(model, optimizer, 2)
    for group, buffers in zip(optimizer.param_groups, (5, 2), strict=True):
        for param in group["params"]:
            assert sum(value.dim() > 0 for value in optimizer.state[param].values()) == buffers


def test_groups_that_are_not_matrices():
    with pytest.raises(
        ValueError, match=r"matrices=True take real tensors of 2 or more dimensions, got .* shape \(3,\)"
    ):
        OMADA([{"params": [nn.Parameter(torch.zeros(3))], "matrices": True}])
    with pytest.raises(ValueError, match="matrices must be a bool, got 1"):
        OMADA([{"params": [nn.Parameter(torch.zeros(3, 3))], "matrices": 1}])
    with pytest.raises(ValueError, match=r"ortho_momentum must be a number in \[0, 1\), got 1.0"):
        OMADA(Deep(), ortho_momentum=1.0)
    with pytest.raises(ValueError, match=r"row_beta must be a number in \[0, 1\), got 1.0"):
        OMADA(Deep(), row_beta=1.0)


def test_a_loss_of_another_size_learns_the_same():
    """ω and the learned scale see no factor of the loss; at a vanishing ε the direction sees none either."""
    learned = []
    for factor in (1.0, 1024.0):
        model = Deep(torch.float64)
        optimizer = OMADA(model, 1e-2, eps=1e-30, ortho=0.5, hyper_lr={"ortho": 0.1})
        for step in range(30):
            optimizer.zero_grad()
            (factor * loss_of(model, step)).backward()
            optimizer.step()
        learned.append([optimizer.coefficients()["ortho"], *optimizer.scale.values.values()])
    assert learned[0] == pytest.approx(learned[1], rel=1e-6)
    assert learned[0][0] != 0.5


def test_by_default_it_finds_two_rates_whatever_is_given():
    """And is Muon and AdamW at these rates from then on, which frozen_config() says how to make."""
    results = []
    for lr in (2.0**-12, 2.0**-4):
        model = Deep()
        optimizer = OMADA(model, lr, weight_decay=0.0)
        train(model, optimizer, 155)
        assert not optimizer.scale.searching
        assert set(optimizer.scale.values) == {"matrices", "rest"}
        assert [group["lr"] for group in optimizer.param_groups] == list(optimizer.scale.values.values())
        results.append((list(model.parameters()), optimizer.scale.values))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    again, settled = Deep(), Deep()
    config = optimizer.frozen_config()
    train(again, OMADA(again, 1.0, weight_decay=0.0, **config), 5)
    fixed = OMADA(settled, weight_decay=0.0, scale=False)
    for group in fixed.param_groups:
        group["lr"] = config["scale"]["matrices" if group["matrices"] else "rest"]
    train(settled, fixed, 5)
    for a, b in zip(again.parameters(), settled.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_with_the_search(way: str):
    model = Deep()
    optimizer = OMADA(model)
    train(model, optimizer, 8)
    if way == "deepcopy":
        other, twin = copy.deepcopy((model, optimizer))
    else:
        other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 160, first=8)
    train(other, twin, 160, first=8)
    assert twin.scale.values == optimizer.scale.values
    assert not twin.scale.searching
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_of_the_first_omada_are_refused_by_name():
    optimizer = OMADA(Deep())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["family"] = "OMADA"
    with pytest.raises(ValueError, match="state_dict is of family 'OMADA', this optimizer of 'OMADA-2'"):
        OMADA(Deep()).load_state_dict(state)


@pytest.mark.parametrize("scale", [0.1, "learn", None])
def test_a_scale_is_asked_for_or_given(scale: object):
    with pytest.raises(TypeError, match="scale must be True, False, or a mapping"):
        OMADA(Deep(), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_changes_its_dtype(dtype: torch.dtype):
    """What OMADA remembers of the weights keeps the dtype that they had."""
    weights = []
    for fused in (None, False):
        model = Deep()
        optimizer = OMADA(model, 1e-3, fused=fused)
        train(model, optimizer, 5)
        model.to(dtype)
        train(model, optimizer, 5, first=5)
        weights.append(torch.cat([param.detach().flatten().float() for param in model.parameters()]))
        assert optimizer.skipped_hypergradients == 0
    torch.testing.assert_close(*weights, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_momentum_in_bfloat16_does_not_stand_still():
    """Rounded to nearest it would stop where its steps are less than half a unit in the last place."""
    weight = nn.Parameter(torch.zeros(40, 50))
    grad = torch.linspace(0.1, 1.0, 2000).view(40, 50)
    groups = [{"params": [weight], "matrices": True}]
    optimizer = OMADA(groups, 1e-3, ortho=0.5, ortho_momentum=0.99, state_dtype=torch.bfloat16, **ADAMW)
    for _ in range(600):
        weight.grad = grad.clone()
        optimizer.step()
    error = optimizer.state[weight]["ortho_exp_avg"].float() / grad - 1
    assert error.mean().abs() < 5e-3


def test_weights_that_are_loaded_before_the_first_step():
    """Distributed checkpoints make an optimizer's state early, by a step at lr = 0; x_1 is what is trained from."""
    results = []
    for early in (True, False):
        model = Net()
        optimizer = OMADA(model, lr=1e-2)
        if early:
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
        model.load_state_dict(Net(seed=1).state_dict())
        train(model, optimizer, 20)
        results.append((list(model.parameters()), optimizer.coefficients()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_single_rows_and_columns_are_no_matrices():
    """A class token, positions and scales of channels, which models keep in as many dimensions as their activations."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for name, shape in {"token": (1, 1, 8), "positions": (1, 16, 8), "scale": (8, 1, 1), "none": (0, 3)}.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert matrix_parameters(model) == [model[0].weight]
    OMADA(model)


def test_complex_weights_are_no_matrices():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4), nn.Linear(4, 2))
    assert matrix_parameters(model) == [model[0].weight, model[2].weight]
    OMADA(model)


def test_parameters_that_were_frozen_are_missed(recwarn):
    """It was made without them, as if they were no part of the model."""
    model = Deep().requires_grad_(False)
    model.out.requires_grad_(True)
    optimizer = OMADA(model)
    train(model, optimizer, 2)
    assert not recwarn
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"made while 'embedding.weight' and \d+ more did not require a gradient"):
        train(model, optimizer, 1)
    train(model, optimizer, 1)
    assert not recwarn
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    again = OMADA(model)
    again.add_param_group({"params": [p.requires_grad_(True) for p in model.parameters() if not p.requires_grad]})
    train(model, again, 1)
    assert not recwarn
