"""A run small enough to be trained many times in a test session, and what it means that two runs are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig
from mada_lab.run.folder import RunFolder
from mada_lab.run.result import Result
from mada_lab.run.stored import StoredRun
from mada_lab.tasks.language import LanguageConfig


def tiny_config(name: str = "mada", **changes: object) -> RunConfig:
    """30 steps of one layer of width 16; the coefficients learn from the third step on."""
    options = {"hyper_warmup": 2, "rho": 0.5} if name == "mada" else {}
    values: dict[str, object] = {"steps": 30, "eval_every": 10, "checkpoint_every": 10, "threads": 1, "device": "cpu"}
    task = LanguageConfig(layers=1, heads=2, width=16, context=16, batch=4, val_windows=8)
    return RunConfig(task, OptimizerConfig(name, lr=1e-2, options=options), **{**values, **changes})  # type: ignore[arg-type]


def stored_run(
    seed: int,
    points: Sequence[Mapping[str, float]] = (),
    *,
    lr: float = 0.1,
    betas: tuple[float, float] | None = None,
    val: float | None = 1.0,
) -> StoredRun:
    """A run that is over, whose coefficients were at ``points``, one after each step; ``val`` None: it diverged."""
    status = "finished" if val is not None else "diverged"
    metrics: list[dict[str, Any]] = [{"step": 0, "val_loss": 2.0}]
    metrics += [{"step": i, "loss": 1.0, "coefficients": dict(point)} for i, point in enumerate(points, start=1)]
    result = Result(status, len(points), val, val, val, 0.0, 0.0, {}, 0)
    return StoredRun(lr, betas, seed, result, metrics, f"lr{lr:g}-seed{seed}")


def without_times(folder: Path) -> list[dict[str, Any]]:
    lines = RunFolder(folder).metrics()
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, at any depth."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    assert without_times(one) == without_times(other)
    assert_same(*(RunFolder(folder).load_checkpoint() for folder in (one, other)))


def assert_close_run(one: Path, other: Path) -> None:
    """Losses, validation, coefficients and weights agree to rounding (float64).

    But for the biases of attention's projections: those of the keys do not change the model, their gradient is rounding
    alone, and Adam makes steps of the usual size of it.
    """
    for line, expected in zip(RunFolder(one).metrics(), RunFolder(other).metrics(), strict=True):
        assert line.keys() == expected.keys()
        for name in {"loss", "val_loss", "coefficients"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=0, abs=1e-10)
    states = [RunFolder(folder).load_checkpoint() for folder in (one, other)]
    one_model, other_model = (
        {name: tensor for name, tensor in state["model"].items() if not name.endswith("c_attn.bias")}
        for state in states
        if state is not None
    )
    torch.testing.assert_close(one_model, other_model, rtol=0, atol=1e-10)
