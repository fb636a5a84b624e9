"""Memory: buffers and parameters in bfloat16, rounded stochastically."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import IDS, TABLE, Net, Row, train
from torch import nn

from mada_optim import MADA
from mada_optim.tensors.rounding import round_stochastically


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_bfloat16_state_halves_it_and_trains_alike(row: Row, fused):
    losses = []
    for state_dtype in (None, torch.bfloat16):
        model = Net(torch.float32)
        optimizer = row(model.parameters(), lr=1e-2, state_dtype=state_dtype, fused=fused)
        train(model, optimizer, 12)
        bits = 16 if state_dtype else 32
        for param in model.parameters():
            kept = {name: v for name, v in optimizer.state[param].items() if v.shape == param.shape and v.dim()}
            assert len(kept) == row.buffers
            assert all(torch.finfo(v.dtype).bits == bits for v in kept.values())
        losses.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("fused", [None, False])
def test_stochastic_rounding_keeps_what_nearest_loses(fused):
    """1000 steps of 1e-5 from 1.0: half a unit in the last place of bfloat16 is 0.002."""
    moved = {}
    for stochastic in (False, True):
        x = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = MADA([x], 1e-5, weight_decay=0.0, hyper_lr=0.0, stochastic_rounding=stochastic, fused=fused)
        for _ in range(1000):
            x.grad = torch.ones_like(x)
            optimizer.step()
        moved[stochastic] = 1.0 - float(x.detach().double().mean())
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("fused", [None, False])
def test_average_of_squares_in_bfloat16_does_not_stand_still(fused):
    """β2 = 0.999 moves v by a thousandth a step, less than bfloat16's last place: rounding to nearest would stop it."""
    x = nn.Parameter(torch.zeros(2048))
    optimizer = MADA([x], betas=(0.9, 0.999), hyper_lr=0.0, state_dtype=torch.bfloat16, fused=fused)
    for _ in range(1000):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert float(optimizer.state[x]["exp_avg_sq"].double().mean()) == pytest.approx(1 - 0.999**1000, rel=0.02)


def test_stochastic_rounding_is_exact_on_representable_values_and_special_ones():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 3.3895e38])
    expected = values.to(torch.bfloat16)
    for seed in range(20):
        torch.testing.assert_close(round_stochastically(values, seed)[:7], expected[:7], rtol=0, atol=0, equal_nan=True)
    assert len({tuple(round_stochastically(torch.rand(50), seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", [0, 12345, (1 << 32) - 1, (1 << 40) + 7, torch.tensor(-(1 << 50) + 3)], ids=str)
def test_stochastic_rounding_adds_the_noise_of_murmurhash3(seed):
    """As native.cpp has it, and as checkpoints count on: computed here in whole numbers, which do not overflow."""
    values = torch.randn(1000)
    expected = []
    for index, bits in enumerate(values.view(torch.int32).tolist()):
        x = (int(seed) + index * 0x9E3779B9) % (1 << 32)
        x = (x ^ x >> 16) * 0x85EBCA6B % (1 << 32)
        x = (x ^ x >> 13) * 0xC2B2AE35 % (1 << 32)
        expected.append(bits + (x >> 16) >> 16)
    assert round_stochastically(values, seed).view(torch.int16).tolist() == expected


def test_stochastic_rounding_keeps_every_nan():
    """Noise would carry all ones, which is how CUDA writes a NaN, over to 0."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert all(bool(round_stochastically(nans, seed).isnan().all()) for seed in range(20))


@pytest.mark.parametrize("fused", [None, False])
def test_stochastic_rounding_resumes_bit_for_bit(fused):
    def make():
        model = Net(torch.float32).bfloat16()
        return model, MADA(model.parameters(), 1e-2, hyper_warmup=2, stochastic_rounding=True, fused=fused)

    model, optimizer = make()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 5, first=5)
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 5, first=5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_in_bfloat16_survives_a_checkpoint():
    model = Net(torch.float32)
    optimizer = MADA(model.parameters(), state_dtype=torch.bfloat16)
    train(model, optimizer, 3)
    other = MADA(model.parameters(), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()}
