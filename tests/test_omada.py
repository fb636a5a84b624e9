"""OMADA: its corners are torch.optim.Muon and MADA, its hypergradients are derivatives, and it finds its way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from problems import Net, loss_of, train
from torch import Tensor, nn

import mada_optim.matrices
from mada_optim import MADA, OMADA, OMADAFamily, matrix_groups, matrix_parameters, orthogonalize

ADAMW = {"hyper_lr": 0.0}


class Deep(nn.Module):
    """Two hidden matrices of one shape, a tall and a wide one, and a convolution, between embedding and output."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.hidden = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 6)])
        self.out = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(self.embedding(x)[..., None])[..., 0]
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)


def test_at_one_corner_it_is_torchs_muon(monkeypatch):
    """Compared step by step from the same weights: Newton-Schulz in bfloat16 would drift apart in many steps.

    In bfloat16, as torch's: its rounding moves small singular values by a tenth.
    """
    monkeypatch.setattr(mada_optim.matrices, "working_dtype", lambda _: torch.bfloat16)
    ours = Deep()
    groups = matrix_groups(ours)
    optimizer = OMADA(ours, lr=1e-2, weight_decay=0.1, ortho=1.0, scale=1.0, **ADAMW)
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
    train(ours, OMADA(ours, **settings, scale=1.0), 30)
    train(theirs, MADA(theirs.parameters(), **settings), 30)
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
    """Of the loss after a step in which one coefficient is moved. That of κ, which is of all steps, is tested below."""
    start = {
        "betas": (0.8, 0.9),
        "beta3": 0.2,
        "rho": 0.4,
        "c": 0.6,
        "gamma": 0.7,
        "ortho": 0.3,
        "scale": 1.5,
        "lr": 1e-2,
    }
    last, names = 5, [c.name for c in OMADAFamily.coefficients]
    model = Deep(torch.float64)
    learning = OMADA(model, **start, hyper_lr=dict.fromkeys(names[:-1], 1e-300))
    train(model, learning, last + 2)

    def loss_with(index: int, shift: float) -> float:
        other = Deep(torch.float64)
        optimizer = OMADA(other, **start, hyper_lr=0.0)
        train(other, optimizer, last)
        optimizer.param_groups[0]["coefficients"][index] += shift
        train(other, optimizer, 1, first=last)
        return loss_of(other, last + 1).item()

    h = 1e-5
    for index, name in enumerate(names[:-1]):
        found = learning.hypergradients()[name]
        difference = (loss_with(index, h) - loss_with(index, -h)) / (2 * h)
        assert found == pytest.approx(difference, rel=1e-5), name


def test_the_scales_hypergradient_is_that_of_all_steps():
    """⟨g, (x + x̄)/2 - x_1⟩ with x̄ the running mean of the iterates from the second on, begun at the first."""
    model = Deep(torch.float64)
    first = [param.detach().clone() for param in model.parameters()]
    means = [param.clone() for param in first]
    optimizer = OMADA(model, 1e-2, hyper_lr={"scale": 0.03})
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        expected = 0.0
        for param, one, mean in zip(model.parameters(), first, means, strict=True):
            mean.copy_(0.9 * mean + 0.1 * param.detach())
            expected += ((0.5 * (param.detach() + mean) - one) * param.grad).sum().item()
        optimizer.step()
        if step:
            assert optimizer.hypergradients()["scale"] == pytest.approx(expected, rel=1e-9)
    assert optimizer.coefficients()["scale"] != 0.1


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


def test_a_loss_of_another_size_learns_the_same():
    """Weights and factor see no scale of the loss; at ε = 0 the direction sees none either."""
    found = []
    for factor in (1.0, 1024.0):
        model = Deep(torch.float64)
        optimizer = OMADA(model, 1e-2, eps=0.0, hyper_lr=dict.fromkeys(("ortho", "scale"), 0.1))
        for step in range(30):
            optimizer.zero_grad()
            (factor * loss_of(model, step)).backward()
            optimizer.step()
        found.append(list(optimizer.coefficients().values()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_small_learning_rate_is_raised_and_a_large_one_lowered():
    factors = []
    for lr in (1e-4, 1.0):
        model = Net(torch.float32)
        optimizer = OMADA(model, lr, weight_decay=0.0, scale=1.0)
        train(model, optimizer, 60)
        factors.append(optimizer.coefficients()["scale"])
    assert factors[0] > 2.0
    assert factors[1] < 0.8


def test_what_is_normalized_does_not_undo_a_schedule():
    """Steps of κ and ω fall with the eighth power of the learning rate."""
    moves = []
    for factor in (1.0, 0.5):
        model = Deep(torch.float64)
        optimizer = OMADA(model, 1e-3, ortho=0.5, hyper_lr={"ortho": 0.01, "scale": 0.1})
        train(model, optimizer, 10)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        train(model, optimizer, 1, first=10)
        before = optimizer.coefficients()
        train(model, optimizer, 1, first=11)
        after = optimizer.coefficients()
        moves.append((math.log(after["scale"] / before["scale"]), after["ortho"] - before["ortho"]))
    for whole, less in zip(*moves, strict=True):
        assert abs(whole) > 1e-4
        assert 0.5 < abs(less / whole) / 0.5**8 < 2


def warm_up(lr: float, rising: int, tensor: bool = False, scale: float = 1.0) -> list[float]:
    """κ after each of 20 steps, in the first half of which the learning rate of a group rises a little."""
    model = Deep()
    optimizer = OMADA(model, torch.tensor(lr) if tensor else lr, scale=scale, weight_decay=0.0)
    found = []
    for step in range(20):
        if step < 10:
            optimizer.param_groups[rising]["lr"] = optimizer.param_groups[rising]["lr"] * 1.01
        train(model, optimizer, 1, first=step)
        found.append(optimizer.coefficients()["scale"])
    return found


@pytest.mark.parametrize("rising", [0, 1])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_scale_does_not_rise_while_a_learning_rate_does(tensor: bool, rising: int):
    found = warm_up(1e-4, rising, tensor)
    assert found[9] <= 1.0
    assert found[19] > 1.2


def test_the_scale_may_fall_while_the_learning_rate_rises():
    found = warm_up(1.0, 0, scale=10.0)
    assert found[9] < 7.0


def test_the_scale_multiplies_the_weight_decay():
    """As if the learning rate were as many times as high."""
    weights = []
    for lr, scale in ((1e-2, 3.0), (3e-2, 1.0)):
        model = Deep(torch.float64)
        train(model, OMADA(model, lr, ortho=0.3, scale=scale, weight_decay=0.5, **ADAMW), 10)
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fused", [None, False])
def test_learning_again_after_a_freeze(fused: bool | None):
    model = Deep()
    optimizer = OMADA(model, 1e-3, ortho=0.5, fused=fused)
    hyper_lr = optimizer.param_groups[0]["hyper_lr"]
    train(model, optimizer, 5)
    optimizer.freeze()
    train(model, optimizer, 2, first=5)
    assert not any("mean_param" in optimizer.state[param] for param in model.parameters())
    frozen = optimizer.coefficients()
    for group in optimizer.param_groups:
        group["hyper_lr"] = hyper_lr
    train(model, optimizer, 5, first=7)
    for name in ("ortho", "scale"):
        assert optimizer.coefficients()[name] != frozen[name]


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


def test_a_group_that_comes_late_does_not_begin_the_learning_rate_anew():
    """Its low learning rate is a later part of the same training, and not the height from which that falls."""
    model, late = Deep(), nn.Parameter(torch.ones(3))
    optimizer = OMADA(model, 1e-2)
    train(model, optimizer, 20)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    train(model, optimizer, 2, first=20)
    optimizer.add_param_group({"params": [("late", late)], "lr": 1e-4})
    before = optimizer.coefficients()["scale"]
    for step in range(22, 32):
        optimizer.zero_grad()
        (loss_of(model, step) + (late**2).sum()).backward()
        optimizer.step()
    assert optimizer.coefficients()["scale"] == pytest.approx(before, rel=1e-12)


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
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4), nn.Linear(4, 2))
    assert matrix_parameters(model) == [model[0].weight, model[2].weight]
    OMADA(model)
