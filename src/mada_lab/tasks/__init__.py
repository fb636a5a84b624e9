"""Tasks: what is trained in an experiment. A task is data, a model and a loss, and knows nothing of optimizers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

Batch = tuple[Tensor, ...]


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, which value, and what is allowed."""


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise :class:`InputError` unless ``condition``.

    >>> require(0 > 1, "steps", 0, "a positive integer")
    Traceback (most recent call last):
    mada_lab.tasks.InputError: steps must be a positive integer, got 0
    """
    if not condition:
        raise InputError(f"{argument} must be {allowed}, got {value!r}")


def require_device(name: str, argument: str = "device") -> None:
    """Raise :class:`InputError` unless torch can put a tensor there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{argument} must be one that torch can use here, got {name!r}: {reason}") from None


class Task(Protocol):
    """What the runner asks of a task.

    Everything here is a pure function of its arguments: two optimizers that are compared see the same model and the
    same data order, and a resumed run needs no state of a random number generator.
    """

    def model(self, seed: int) -> nn.Module:
        """A model with random weights that depend on ``seed`` alone, in float32 on the CPU."""

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of step number ``step`` (1, 2, ...), on the CPU."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar training loss of a batch, on the model's device."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Means over validation data that is the same at every call: ``"loss"``, and what else the task measures."""

    def describe(self) -> dict[str, Any]:
        """What identifies the data, as JSON values; a run is resumed only where this is the same."""


@dataclass(frozen=True)
class TaskConfig(ABC):
    """The choices that make a task. Subclasses are frozen dataclasses that go to JSON and back.

    Args:
        data: path of the data; None: data that is always there, without a file and a network.
    """

    kind: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ("data",)  # fields that are paths
    data: str | None = None

    @abstractmethod
    def build(self) -> Task:
        """The task, its data loaded. Raises :class:`InputError` where that cannot be used."""

    def resolved(self) -> Self:
        """The same, from whatever folder it is built: a run must be resumable from any."""
        paths = {name: getattr(self, name) for name in self.paths}
        # What is not there may be a name on the hub; if not, building the task will say so.
        there: dict[str, Any] = {
            name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()
        }
        return dataclasses.replace(self, **there)
