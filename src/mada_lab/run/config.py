"""What a run is: frozen dataclasses that go to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mada_lab.tasks import InputError, TaskConfig, require
from mada_lab.tasks.language import LanguageConfig
from mada_lab.tasks.tokens import TokensConfig
from mada_lab.tasks.vision import VisionConfig

TASKS: dict[str, type[TaskConfig]] = {task.kind: task for task in (LanguageConfig, TokensConfig, VisionConfig)}
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, with what the user set.

    Args:
        name: one of ``mada_lab.optimizers.registry.ENTRIES``.
        lr: peak learning rate. None: the optimizer's own (3e-3; lion 1e-3, prodigy 1).
        betas: None: (0.9, 0.99), or the optimizer's own where these mean something else to it (adan, lion).
        weight_decay: decoupled, on tensors of two and more dimensions. None: 0.1 (adam: 0).
        options: further arguments of the constructor, by name; only what the user set. ``betas`` and ``weight_decay``
            among them become the fields of this name, so that they are not overruled by these.

    Raises:
        InputError: a value is not allowed; or ``options`` has ``lr``, which is a field of its own, or says of a field
            something else than the field does.
    """

    name: str = "mada"
    lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lr = self.lr
        require(lr is None or (_is_number(lr) and lr > 0), "lr", lr, "a positive number")
        self._take_fields_out_of_options()
        decay = self.weight_decay
        require(decay is None or (_is_number(decay) and decay >= 0), "weight_decay", decay, "a number >= 0")

    def _take_fields_out_of_options(self) -> None:
        options = dict(self.options)
        for name in ("name", "lr"):
            if name in options:
                raise InputError(
                    f"options of {self.name} must not have {name}, got {options[name]!r}: it is set for the whole run, "
                    "the learning rate by --lr, --lrs or the axis optimizer.lr"
                )
        for name in ("betas", "weight_decay"):
            if name not in options:
                continue
            value = options.pop(name)
            value = pair(name, value) if name == "betas" else value
            field_value = getattr(self, name)
            require(
                field_value in (None, value),
                f"{name} in the options of {self.name}",
                value,
                f"{field_value!r}, as outside of them",
            )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class RunConfig:
    """One training.

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
            require(value is None or (_is_number(value) and 0 <= value <= 1), name, value, "a number from 0 to 1")
        require(_is_number(self.clip) and self.clip >= 0, "clip", self.clip, "a number >= 0 (0: no clipping)")
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2**32-1"
        )
        threads = self.threads
        require(
            threads is None or (isinstance(threads, int) and threads >= 1), "threads", threads, "a positive integer"
        )
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of step number ``step`` = 1, ..., ``steps`` of a resolved configuration.

        >>> config = RunConfig(steps=100, warmup=0.1, final_lr=0.1, optimizer=OptimizerConfig(lr=1.0))
        >>> [round(config.learning_rate(step), 3) for step in (1, 10, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        assert self.final_lr is not None
        assert self.optimizer.lr is not None
        peak, warmup = self.optimizer.lr, round(self.warmup * self.steps)
        if step <= warmup:
            return peak * step / warmup
        progress = (step - warmup) / (self.steps - warmup)
        return peak * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """As JSON values; :func:`from_dict` is the inverse."""
    values = dataclasses.asdict(config)
    values["task"] = {"kind": config.task.kind, **values["task"]}
    betas = config.optimizer.betas
    values["optimizer"]["betas"] = None if betas is None else list(betas)
    return values


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that :func:`to_dict` wrote.

    >>> from_dict(to_dict(RunConfig())) == RunConfig()
    True
    """
    try:
        optimizer = dict(values["optimizer"])
        if optimizer["betas"] is not None:
            optimizer["betas"] = tuple(optimizer["betas"])
        parts = {"task": make_task(values["task"]), "optimizer": OptimizerConfig(**optimizer)}
        return RunConfig(**{**values, **parts})
    except (KeyError, TypeError) as error:
        raise InputError(f"not the configuration of a run: {error}") from None


def make_task(values: Mapping[str, Any]) -> TaskConfig:
    """The task of kind ``values["kind"]`` (default: language) with the other values as its arguments.

    >>> make_task({"kind": "language", "width": 64}).kind
    'language'
    """
    kind = values.get("kind", LanguageConfig.kind)
    require(kind in TASKS, "task", kind, f"one of {', '.join(TASKS)}")
    known = [item.name for item in dataclasses.fields(TASKS[kind])]
    given = {name: value for name, value in values.items() if name != "kind"}
    for name in given:
        require(name in known, f"argument of task {kind}", name, f"one of {', '.join(known)}")
    return TASKS[kind](**given)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested dicts differ, as ``"task.width: 128, there 64"``.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b: 1, there 3']
    """
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        here, there = ours.get(key), theirs.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            found.append(f"{prefix}{key}: {here!r}, there {there!r}")
    return found


def pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers as a tuple. Raises :class:`InputError`, naming the argument, where they are not."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    require(numbers and len(value) == 2, name, value, "two numbers")
    return value[0], value[1]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
