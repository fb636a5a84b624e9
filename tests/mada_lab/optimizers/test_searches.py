"""OMADA with another search for its learning rates, for ablations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Net, loss_of, train

from mada_lab.optimizers import build as optimizers
from mada_lab.optimizers.config import OptimizerConfig
from mada_optim import OMADA


def searching(model: Net, name: str = "omada-search", **options: Any) -> OMADA:
    optimizer = optimizers.build(optimizers.resolve_optimizer(OptimizerConfig(name, options=options)), model)
    assert isinstance(optimizer, OMADA)
    return optimizer


def scales(optimizer: OMADA) -> dict[Any, float]:
    assert optimizer.scale is not None
    return optimizer.scale.values


def test_by_default_it_is_omada() -> None:
    ours, theirs = Net(), Net()
    one, other = searching(ours), searching(theirs, "omada")
    train(ours, one, 40)
    train(theirs, other, 40)
    assert scales(one) == scales(other)
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"swing": 0.0},
        {"window": 0.5},
        {"climb": 0.3},
        {"rate": 0.01},
        {"steps": 20},
        {"margin": 1.0, "steps": 30},
        {"one_scale": True},
        {"next_step": True},
    ],
)
def test_each_option_changes_what_is_found(options: dict[str, Any]) -> None:
    plain, changed = Net(), Net()
    one, other = searching(plain, **({"steps": 30} if "margin" in options else {})), searching(changed, **options)
    train(plain, one, 60)
    train(changed, other, 60)
    assert scales(one) != scales(other)
    assert len(scales(other)) == (1 if options.get("one_scale") else 2)


def test_the_search_along_the_next_step_leaves_the_way_gone_alone() -> None:
    """So its steps are those of OMADA without a search at the same rates."""
    ours, theirs = Net(), Net()
    search = searching(ours, next_step=True, steps=50)
    plain = searching(theirs, "omada", scale=False)
    for step in range(60):
        for model, optimizer in ((ours, search), (theirs, plain)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if optimizer is search:
                optimizer.step()
                continue
            for group in plain.param_groups:
                group["lr"] = scales(search)["matrices" if group["matrices"] else "rest"]
            plain.step()
        for pair in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-14)
    assert max(scales(search).values()) > 1e-3  # it went up
