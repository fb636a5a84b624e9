"""The conventions of torch.optim.Muon as options: each equal to torch's own step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

import mada_optim.matrices.directions
from mada_optim import OMADA, orthogonalize

OPTIONS = [
    {},
    {"ns_steps": 3},
    {"ns_coefficients": (3.0, -3.2, 1.2)},
    {"ns_steps": 7, "ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "original"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_that_of_torchs_muon(options: dict, monkeypatch):
    monkeypatch.setattr(mada_optim.matrices.directions, "working_dtype", lambda _: torch.bfloat16)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (6, 24), (24, 6), (8, 8))]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    optimizer = OMADA([{"params": ours, "matrices": True}], lr=1e-2, weight_decay=0.1, scale=False, **options)
    muon = torch.optim.Muon(theirs, 1e-2, weight_decay=0.1, **{"adjust_lr_fn": "match_rms_adamw", **options})
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a.detach())
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        muon.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-2 * 2**-6)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)], ids=str)
def test_in_float32_it_is_torchs_iteration_without_rounding(shape: tuple[int, int], options: dict, monkeypatch):
    """Torch's function, but for its cast to bfloat16."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    coefficients, steps = options.get("ns_coefficients", (3.4445, -4.775, 2.0315)), options.get("ns_steps", 5)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    expected = _zeropower_via_newtonschulz(matrix, coefficients, steps, 1e-7)
    factor = _adjust_lr(1.0, options.get("adjust_lr_fn", "match_rms_adamw"), matrix.shape)
    (direction,) = orthogonalize([matrix], **options)
    torch.testing.assert_close(direction, factor * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 0}, "ns_steps must be None or an integer from 1 to 99, got 0"),
        ({"ns_steps": 2.0}, "ns_steps must be None or an integer from 1 to 99, got 2.0"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients must be None or three finite numbers, got \(1.0, 2.0\)"),
        (
            {"ns_coefficients": (float("nan"), 1, 1)},
            r"ns_coefficients must be None or three finite numbers, got \(nan, 1, 1\)",
        ),
        (
            {"ns_coefficients": (True, 1, 1)},
            r"ns_coefficients must be None or three finite numbers, got \(True, 1, 1\)",
        ),
        ({"ns_coefficients": "abc"}, "ns_coefficients must be None or three finite numbers, got 'abc'"),
        ({"adjust_lr_fn": "adam"}, "adjust_lr_fn must be one of match_rms_adamw, original, got 'adam'"),
    ],
    ids=str,
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OMADA([{"params": [nn.Parameter(torch.zeros(3, 3))], "matrices": True}], **options)


def test_options_of_a_group_count_and_are_kept():
    matrices = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    groups = [{"params": [matrices[0]], "matrices": True, "ns_steps": 2}, {"params": [matrices[1]], "matrices": True}]
    optimizer = OMADA(groups, 1e-2, scale=False)
    torch.manual_seed(0)
    grad = torch.randn(4, 6)
    for matrix in matrices:
        matrix.grad = grad.clone()
    optimizer.step()
    assert not torch.allclose(*matrices, atol=1e-4)
    assert [group["ns_steps"] for group in optimizer.state_dict()["param_groups"]] == [2, None]
