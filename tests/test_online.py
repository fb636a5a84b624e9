"""The online problem of Reddi et al. ("On the convergence of Adam and beyond", 2018), on which Adam goes wrong."""

from __future__ import annotations

import pytest
import torch

from mada_optim import MADA, AVGrad, load_optimizer

PERIOD, PERIODS, BETAS = 101, 300, (0.95, 0.99)


def final_iterate(make) -> float:
    """Minimize Σ f_t on [-1, 1], f_t = 1010 x once in a period and -10 x otherwise: the minimum is at -1.

    Returns the mean iterate of the last ten periods.
    """
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([x])
    total = 0.0
    for t in range(PERIOD * PERIODS):
        optimizer.param_groups[0]["lr"] = 2.0 / (1 + t) ** 0.5
        x.grad = torch.full_like(x, 1010.0 if t % PERIOD == 0 else -10.0)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1.0, 1.0)
        if t >= PERIOD * (PERIODS - 10):
            total += x.item()
    return total / (10 * PERIOD)


def test_adam_runs_to_the_wrong_end():
    assert final_iterate(lambda p: load_optimizer("adam")(p, betas=BETAS)) > 0.9


def test_avgrad_goes_to_the_right_end():
    assert final_iterate(lambda p: AVGrad(p, betas=BETAS, weight_decay=0.0)) < -0.9


def test_mada_that_starts_as_adam_and_learns_rho_turns_to_the_right_end():
    """With the default step size of ρ; its first thousands of steps, near Adam's point, have to be made good."""
    found: list[MADA] = []

    def make(params: list[torch.nn.Parameter]) -> MADA:
        found.append(MADA(params, betas=BETAS, weight_decay=0.0, hyper_lr={"rho": 0.1}))
        return found[0]

    assert final_iterate(make) < -0.4
    assert found[0].coefficients()["rho"] == pytest.approx(0.0, abs=0.1)
