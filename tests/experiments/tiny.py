"""A run small enough to be trained many times in a test session."""

from __future__ import annotations

from mada_optim.experiments.config import OptimizerConfig, RunConfig
from mada_optim.tasks.language import LanguageConfig


def tiny_config(name: str = "mada", **changes: object) -> RunConfig:
    """30 steps of one layer of width 16; the coefficients learn from the third step on."""
    options = {"hyper_warmup": 2, "rho": 0.5} if name == "mada" else {}
    values: dict[str, object] = {"steps": 30, "eval_every": 10, "checkpoint_every": 10, "threads": 1, "device": "cpu"}
    task = LanguageConfig(layers=1, heads=2, width=16, context=16, batch=4, val_windows=8)
    return RunConfig(task, OptimizerConfig(name, lr=1e-2, options=options), **{**values, **changes})  # type: ignore[arg-type]
