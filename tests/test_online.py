"""The online problem of Reddi et al. ("On the convergence of Adam and beyond", 2018), on which Adam goes wrong."""

from __future__ import annotations

import pytest
import torch

from mada_optim import AVGrad, HypergradientOptimizer, load_optimizer

PERIOD, STEPS = 101, 6 * 10**4


def final_iterate(make) -> tuple[float, HypergradientOptimizer]:
    """Minimize Σ f_t on [-1, 1], f_t = 1010 x once in a period and -10 x otherwise: the minimum is at -1."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([x])
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + t) ** 0.5
        x.grad = torch.full_like(x, 1010.0 if t % PERIOD == 1 else -10.0)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1.0, 1.0)
    return x.item(), optimizer


@pytest.mark.parametrize(
    ("name", "make", "end"),
    [
        ("adam", lambda p: load_optimizer("adam")(p, betas=(0.0, 0.99)), 1.0),
        ("torch adam", lambda p: torch.optim.Adam(p, betas=(0.0, 0.99)), 1.0),
        ("avgrad", lambda p: AVGrad(p, betas=(0.0, 0.99), weight_decay=0.0), -1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_end(name, make, end):
    assert final_iterate(make)[0] == pytest.approx(end, abs=0.2)
