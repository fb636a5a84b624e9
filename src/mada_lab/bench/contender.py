"""What is timed: an optimizer, something that trains like one, or a routine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from mada_lab.bench.routines import Routine

LR = 1e-4


class TrainedModel(Protocol):
    """A workload with a model, for what trains it in its own way."""

    def fresh_model(self, tied: bool) -> nn.Module:
        """Return a model of its own, whose input and output embeddings are one tensor or two."""

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a model."""


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Args:
        name: as it is printed.
        kind: "ours", "torch" or "peer".
        make: optimizer from parameters or parameter groups.
        unit: how many steps are timed as one, for those whose steps differ.
        words: float32 numbers for each parameter that a step must read and write at least, where we know.
        start: for what is not an optimizer in torch's sense: a function that trains one step, from a training workload.
        routine: for what only orthogonalizes matrices: a function of a list of tensors and of how matrices lie in each.
        package: that it needs beside ours, by the name under which it is imported.
        workloads: letters of those that it runs on.
    """

    name: str
    kind: str
    make: Callable[[Any], Optimizer] | None = None
    unit: int = 1
    words: float | None = None
    start: Callable[[TrainedModel], Callable[[], None]] | None = None
    routine: Routine | None = None
    package: str | None = None
    workloads: str = "abc"

    @property
    def is_there(self) -> bool:
        """Whether the package that it needs is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None
