"""What a task is: data, a model and a loss. It knows nothing of optimizers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from typing_extensions import Self

from mada_lab.errors import require

Batch = tuple[Tensor, ...]


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
    unit: ClassVar[str] = "nats"  # of the loss that is validated
    paths: ClassVar[tuple[str, ...]] = ("data",)  # fields that are paths
    data: str | None = None

    def _require_positive(self, *names: str) -> None:
        """Raise :class:`InputError` where a field is not a positive integer."""
        for name in names:
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a positive integer")

    @abstractmethod
    def build(self) -> Task:
        """The task, its data loaded. Raises :class:`InputError` where that cannot be used."""

    def resolved(self) -> Self:
        """Return the same configuration with absolute paths: a run must be resumable from any folder."""
        paths = {name: getattr(self, name) for name in self.paths}
        # What is not there may be a name on the hub; if not, building the task will say so.
        there: dict[str, Any] = {
            name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()
        }
        return dataclasses.replace(self, **there)
