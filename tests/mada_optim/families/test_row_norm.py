"""OMADA's ν: from Muon's step to NorMuon's, and what it keeps for that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import INTERIOR
from torch import Tensor, nn
from twin import MatrixTwin, normuon_rows

import mada_optim.families
from mada_optim import OMADA, HypergradientOptimizer, OMADAFamily
from mada_optim.kernels import select
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.native.executor import NativeExecutor
from mada_optim.kernels.traced.compiled import CompiledExecutor
from mada_optim.matrices import orthogonalize

STEPS = 6
KERNELS = [{"fused": None}, {"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}]


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Rows of very different sizes, one of them without any gradient."""
    generator = torch.Generator().manual_seed(step + 1)
    found = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        rows = grad.transpose(0, 1) if grad.dim() == 3 else grad  # a stack's rows are its second dimension
        rows *= 10.0 ** torch.linspace(-2, 2, len(rows), dtype=torch.float64).view(-1, *[1] * (grad.dim() - 1))
        rows[0] = 0.0
        found.append(grad.to(param.dtype))
    return found


def take_steps(params: list[nn.Parameter], optimizer: HypergradientOptimizer, steps: int = STEPS, first: int = 0):
    for step in range(first, first + steps):
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        optimizer.step()


def make(params: list[nn.Parameter], **options: Any) -> OMADA:
    groups = [{"params": params, "matrices": True, "split": options.pop("split", None)}]
    return OMADA(groups, **{"lr": 0.1, "scale": False, "weight_decay": 0.0, **options})


def sizes(optimizer: OMADA, param: Tensor) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in optimizer.state[param].items() if value.dim()}


# ---- NorMuon at its end.


def slices(*parts: Any) -> Callable[[Tensor], list[Tensor]]:
    return lambda tensor: [tensor[part] for part in parts]


ROWS_Q = [0, 1, 2, 6, 7, 8]  # of two repeats of three rows of q, two of k, one of v
LAYOUTS: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...], Callable[[Tensor], list[Tensor]]]] = {
    "wide": ((4, 9), None, (4, 1), slices(...)),
    "tall": ((9, 4), None, (9, 1), slices(...)),
    "convolution": ((6, 3, 2, 2), None, (6, 1), lambda tensor: [tensor.flatten(1)]),
    "fused rows": ((12, 5), [2, 1, 1], (12, 1), slices(slice(0, 6), slice(6, 9), slice(9, 12))),
    "heads": (
        (12, 5),
        {"parts": [3, 2, 1], "repeats": 2},
        (12, 1),
        slices(ROWS_Q, [3, 4, 9, 10], [5, 11]),
    ),
    "fused columns": (
        (5, 12),
        {"dim": 1, "parts": [2, 1, 1]},
        (5, 3),
        slices((slice(None), slice(0, 6)), (slice(None), slice(6, 9)), (slice(None), slice(9, 12))),
    ),
    "experts": ((3, 6, 4), {"stacked": True}, (3, 6, 1), slices(0, 1, 2)),
    "experts, fused columns": (
        (2, 4, 6),
        {"stacked": True, "dim": 1, "parts": [1, 1]},
        (2, 4, 2),
        lambda tensor: [tensor[e, :, part] for e in (0, 1) for part in (slice(0, 3), slice(3, 6))],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_one_it_is_normuon(layout: str, dtype: torch.dtype):
    """As microsoft/dion's NorMuon: each matrix's r ← β r + (1-β) mean(U²), U / (√r + 1e-8), rescaled to U's norm."""
    shape, split, kept, matrices = LAYOUTS[layout]
    (param,), (twin,) = params, muon = weights([shape], dtype), weights([shape], dtype)
    optimizer, theirs = make(params, split=split, row_norm=1.0), make(muon, split=split)
    moments: dict[int, Tensor] = {}
    for step in range(STEPS):
        before = param.detach().clone()
        take_steps(params, optimizer, 1, first=step)
        take_steps(muon, theirs, 1, first=step)
        normalized, direction = (one.state[p]["ortho"] for one, p in ((optimizer, param), (theirs, twin)))
        torch.testing.assert_close(param.detach(), before - 0.1 * normalized)
        for number, (ours, muons) in enumerate(zip(matrices(normalized), matrices(direction.double()), strict=True)):
            scale = 0.2 * max(muons.shape) ** 0.5
            square = (muons / scale).square().mean(1, keepdim=True)
            moments[number] = 0.95 * moments.get(number, torch.zeros_like(square)) + 0.05 * square
            expected = scale * normuon_rows(muons / scale, moments[number])
            torch.testing.assert_close(ours.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert sizes(optimizer, param) == {"ortho_exp_avg": shape, "ortho": shape, "ortho_row_sq": kept}


def test_rows_that_were_never_used_stay_where_they_are():
    (param,) = params = weights([(5, 7)], torch.float32)
    optimizer = make(params, row_norm=1.0)
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before)
    take_steps(params, optimizer)
    assert torch.isfinite(param).all()
    assert torch.equal(param[0], before[0])


# ---- Between the ends, and learned.


@pytest.mark.parametrize("options", KERNELS, ids=str)
@pytest.mark.parametrize("q", [{"ortho": 0.6, "row_norm": 0.3}, {"ortho": 1.0, "row_norm": 0.3}, {"row_norm": 1.0}])
def test_equals_the_twin(q: dict[str, float], options: dict[str, Any]):
    params = weights([(4, 9), (9, 4)])
    q = INTERIOR | {"ortho": 0.6} | q
    start = {name: value for name, value in q.items() if name not in ("beta1", "beta2")}
    optimizer = make(params, betas=(0.8, 0.9), weight_decay=0.1, row_beta=0.7, **start, **options)

    def orthogonal(matrix: Tensor) -> Tensor:
        return orthogonalize([matrix])[0] / (0.2 * max(matrix.shape) ** 0.5)

    twin = MatrixTwin([param.detach().clone() for param in params], 0.1, q, orthogonal, beta=0.7, wd=0.1)
    for step in range(STEPS):
        take_steps(params, optimizer, 1, first=step)
        twin.step(gradients(params, step))
        torch.testing.assert_close([param.detach() for param in params], twin.x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nu", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", [NativeExecutor, CompiledExecutor, EagerExecutor])
def test_hypergradient_equals_finite_differences(kind: type[EagerExecutor], nu: float, monkeypatch):
    """Of the next gradient's product with the weights after one step, which is linear in them."""
    monkeypatch.setattr(mada_optim.engine.group_step, "select_executor", lambda family, *_: select.the(kind))
    settings = {"ortho": 0.7, "hyper_warmup": 0}

    def trained(row_norm: float, hyper_lr: float) -> tuple[list[nn.Parameter], OMADA]:
        params = weights([(4, 9), (9, 4)])
        return params, make(params, row_norm=row_norm, hyper_lr={"row_norm": hyper_lr}, **settings)

    params, learning = trained(nu, 1e-300)
    take_steps(params, learning, 2)
    inner = []
    for shifted in (nu + 1e-5, nu - 1e-5) if 0 < nu < 1 else (0.75, 0.25):
        others, optimizer = trained(shifted, 0.0)
        take_steps(others, optimizer, 1)
        inner.append(sum(float((p.detach() * g).sum()) for p, g in zip(others, gradients(others, 1), strict=True)))
    difference = (inner[0] - inner[1]) / (2e-5 if 0 < nu < 1 else 0.5)
    assert learning.hypergradients()["row_norm"] == pytest.approx(difference, rel=1e-6)
    assert difference != 0.0


def test_it_is_learned():
    params = weights([(4, 9), (9, 4)], torch.float32)
    optimizer = make(params, row_norm=0.5, hyper_lr={"row_norm": 0.01}, hyper_warmup=2)
    take_steps(params, optimizer)
    assert 0.0 < abs(optimizer.coefficients()["row_norm"] - 0.5) < 0.05  # at most 0.01 a step
    assert OMADA(nn.Linear(3, 4), **optimizer.frozen_config()).coefficients() == optimizer.coefficients()
    vector = [nn.Parameter(torch.zeros(3))]
    without = OMADA([{"params": vector, "matrices": False}], scale=False, hyper_lr={"row_norm": 0.1})
    vector[0].grad = torch.ones(3)
    without.step()
    assert "pending_grad" not in without.state[vector[0]]  # it is idle where there are no matrices


# ---- What is kept.


def test_what_is_kept(monkeypatch):
    moved = {"ortho_exp_avg": (4, 9), "ortho": (4, 9)}
    row = {"ortho_row_sq": (4, 1)}
    both = {"ortho_normalized": (4, 9)}
    for options, expected in (
        ({"row_norm": 1.0}, moved | row),
        ({"row_norm": 0.5}, moved | row | both),
        ({"hyper_lr": {"row_norm": 0.1}}, moved | row | both | {"pending_grad": (4, 9)}),
        ({"row_norm": 0.5, "ortho": 0.0}, {"exp_avg": (4, 9), "exp_avg_sq": (4, 9)}),
    ):
        params = weights([(4, 9)])
        optimizer = make(params, **options)
        take_steps(params, optimizer, 2)
        assert sizes(optimizer, params[0]) == expected
    monkeypatch.setattr(mada_optim.families.orthogonal, "normalize_rows", lambda *_: pytest.fail("computed at ν = 0"))
    params = weights([(4, 9)])
    optimizer = make(params)
    take_steps(params, optimizer, 2)
    assert sizes(optimizer, params[0]) == moved
    assert optimizer.coefficients()["row_norm"] == 0.0


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_not_rounded(dtype: torch.dtype, state_dtype: torch.dtype | None):
    params = weights([(4, 9)], dtype)
    optimizer = make(params, row_norm=1.0, state_dtype=state_dtype, stochastic_rounding=True)
    take_steps(params, optimizer)
    kept = optimizer.state[params[0]]["ortho_row_sq"]
    assert kept.dtype == torch.promote_types(dtype, torch.float32)
    assert not torch.equal(kept, kept.bfloat16())


@pytest.mark.parametrize("nu", [0.5, 1.0])
def test_maximizing_is_minimizing_the_opposite(nu: float):
    params, others = weights([(4, 9)]), weights([(4, 9)])
    take_steps(params, make(params, row_norm=nu))
    optimizer = make(others, row_norm=nu, maximize=True)
    for step in range(STEPS):
        others[0].grad = -gradients(others, step)[0]
        optimizer.step()
    assert torch.equal(params[0], others[0])


OPTIONS = [
    {"row_norm": 1.0},
    {"row_norm": 1.0, "split": {"dim": 1, "parts": (2, 1)}},
    {"hyper_lr": {"row_norm": 0.1, "ortho": 0.1}, "hyper_warmup": 1},
    {"row_norm": 1.0, "state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumes_bit_for_bit(options: dict[str, Any]):
    params = weights([(4, 9), (9, 6)], torch.float32)
    optimizer = make(params, **options)
    take_steps(params, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = make(others, **options)
    resumed.load_state_dict(saved)
    for one, other in zip(params, others, strict=True):
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(resumed.state[other][name], tensor), name
            assert resumed.state[other][name].dtype == tensor.dtype
    take_steps(params, optimizer, 3, first=3)
    take_steps(others, resumed, 3, first=3)
    assert all(map(torch.equal, params, others))
    assert resumed.coefficients() == optimizer.coefficients()


def test_a_state_whose_rows_do_not_fit():
    params = weights([(4, 9)])
    optimizer = make(params, row_norm=1.0)
    take_steps(params, optimizer, 1)
    saved = optimizer.state_dict()
    for wrong, message in ((torch.zeros(4, 9), r"ortho_row_sq of shape \(4, 9\) .* expected \(4, 1\)"), (None, "no '")):
        state = {**saved["state"][0], "ortho_row_sq": wrong}
        with pytest.raises(ValueError, match=message):
            make(weights([(4, 9)]), row_norm=1.0).load_state_dict({**saved, "state": {0: state}})


def test_family_without_its_optimizer():
    """Groups without matrices have no rows."""
    family = OMADAFamily()
    q = {name: torch.tensor(0.5) for name in ("ortho", "row_norm", "beta3", "rho", "gamma")}
    assert family.statistics({**q, "matrices": False, "split": None}) == {}
    shapes = family.statistics({**q, "matrices": True, "split": None})
    assert {name: shape(torch.Size([3, 2])) for name, shape in shapes.items()} == {"ortho_row_sq": (3, 1)}
