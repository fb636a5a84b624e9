"""What a run is: as it is written, and resolved. Frozen dataclasses that go to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from mada_lab.errors import InputError, is_number, require, require_device
from mada_lab.optimizers.build import resolve_optimizer
from mada_lab.optimizers.config import OptimizerConfig, ResolvedOptimizer
from mada_lab.optimizers.registry import find
from mada_lab.tasks.base import TaskConfig
from mada_lab.tasks.language import LanguageConfig
from mada_lab.tasks.registry import make_task

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class RunConfig:
    """One training, as a user describes it. :func:`resolve` says what None stands for.

    Args:
        task: data, model and batch.
        optimizer: name and arguments.
        steps: number of steps.
        warmup: share of the steps in which the learning rate rises linearly; it then follows a cosine.
        final_lr: learning rate at the end, as a share of the peak. None: 0.1 (schedulefree: 1).
        clip: maximal norm of the gradient; 0: not clipped.
        hyper_unclipped: whether hypergradients see gradients as they were before they were clipped.
        accumulate: micro-batches into which each process cuts its part of a batch; their gradients are added up, so
            that the step is that of the whole batch, in the memory of a part (but for dropout and batch normalization).
        seed: of the initial weights and of the data order.
        eval_every, checkpoint_every: number of steps between two validations, two checkpoints.
        threads: of torch on the CPU; None: torch's choice. A resumed run keeps the number.
        device: None: cuda where there is one, else cpu.
        dtype: of the parameters.
    """

    task: TaskConfig = field(default_factory=LanguageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    warmup: float = 0.05
    final_lr: float | None = None
    clip: float = 1.0
    hyper_unclipped: bool = False
    accumulate: int = 1
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 200
    threads: int | None = None
    device: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a positive integer")
        for name in ("warmup", "final_lr"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and 0 <= value <= 1), name, value, "a number from 0 to 1")
        require(is_number(self.clip) and self.clip >= 0, "clip", self.clip, "a number >= 0 (0: no clipping)")
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2**32-1"
        )
        threads = self.threads
        require(
            threads is None or (isinstance(threads, int) and threads >= 1), "threads", threads, "a positive integer"
        )
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ResolvedRun(RunConfig):
    """One training with a value for everything: what config.json holds, and what workers receive."""

    optimizer: ResolvedOptimizer = field(kw_only=True)
    final_lr: float = field(kw_only=True)
    threads: int = field(kw_only=True)
    device: str = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("final_lr", "threads", "device"):
            require(getattr(self, name) is not None, name, None, "set in a run that is to be trained")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step number ``step`` = 1, ..., ``steps``.

        >>> run = resolve(RunConfig(steps=100, warmup=0.1, final_lr=0.1, optimizer=OptimizerConfig(lr=1.0)))
        >>> [round(run.learning_rate(step), 3) for step in (1, 10, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        peak, warmup = self.optimizer.lr, round(self.warmup * self.steps)
        if step <= warmup:
            return peak * step / warmup
        progress = (step - warmup) / (self.steps - warmup)
        return peak * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def resolve(config: RunConfig) -> ResolvedRun:
    """Put a value in place of every None, and check that this machine can train it.

    Raises:
        InputError: there is no such optimizer, it does not take its options, or torch cannot use the device.
    """
    config = on_this_machine(config)
    entry = find(config.optimizer.name)
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values["optimizer"] = resolve_optimizer(config.optimizer)
    values["final_lr"] = entry.final_lr if config.final_lr is None else config.final_lr
    return ResolvedRun(**values)


def on_this_machine(config: RunConfig) -> RunConfig:
    """Return ``config`` with its device, its number of threads and the places of its data.

    Its optimizer and ``final_lr`` stay as they are written: None in them means something else for each optimizer.
    """
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    threads = config.threads or torch.get_num_threads()
    return dataclasses.replace(config, task=config.task.resolved(), threads=threads, device=device)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration as JSON values; :func:`from_dict` is the inverse."""
    values = dataclasses.asdict(config)
    values["task"] = {"kind": config.task.kind, **values["task"]}
    betas = config.optimizer.betas
    values["optimizer"]["betas"] = None if betas is None else list(betas)
    return values


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that :func:`to_dict` wrote.

    >>> from_dict(to_dict(RunConfig())) == RunConfig()
    True
    """
    return _from_dict(values, RunConfig, OptimizerConfig)


def resolved_from_dict(values: Mapping[str, Any]) -> ResolvedRun:
    """Return the resolved run that :func:`to_dict` wrote."""
    return _from_dict(values, ResolvedRun, ResolvedOptimizer)


Config = TypeVar("Config", bound=RunConfig)


def _from_dict(values: Mapping[str, Any], kind: type[Config], optimizer_kind: type[OptimizerConfig]) -> Config:
    try:
        optimizer = dict(values["optimizer"])
        if optimizer["betas"] is not None:
            optimizer["betas"] = tuple(optimizer["betas"])
        parts = {"task": make_task(values["task"]), "optimizer": optimizer_kind(**optimizer)}
        return kind(**{**values, **parts})
    except (KeyError, TypeError) as error:
        raise InputError(f"not the configuration of a run: {error}") from None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return where two nested dicts differ, as ``"task.width: 128, there 64"``.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b: 1, there 3']
    """
    differing = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        here, there = ours.get(key), theirs.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            differing += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            differing.append(f"{prefix}{key}: {here!r}, there {there!r}")
    return differing
