"""Regression on tables: a file of numbers, or those that scikit-learn carries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mada_lab.errors import InputError, require
from mada_lab.tasks.base import Batch, TaskConfig

Rows = npt.NDArray[np.float64]  # (N, columns); the last column is the target

TABLES = ("diabetes", "digits")
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class TabularConfig(TaskConfig):
    """Table, network and batch.

    Args:
        data: file of comma-separated numbers under one line of names; the last column is the target. None: ``table``.
        table: of scikit-learn, where there is no ``data``: "diabetes", 442 patients, 10 numbers each; or "digits",
            1,797 images of 64 pixels, whose digit is to be told as a number.
        layers, width: hidden layers of the network, and their width.
        batch: rows in a batch.
    """

    kind: ClassVar[str] = "tabular"
    unit: ClassVar[str] = "shares of the target's variance"
    table: str = "diabetes"
    layers: int = 2
    width: int = 64
    batch: int = 32

    def __post_init__(self) -> None:
        require(self.table in TABLES, "table", self.table, f"one of {', '.join(TABLES)}")
        self._require_positive("layers", "width", "batch")

    def build(self) -> TabularTask:
        return TabularTask(self)


class TabularTask:
    """Predict a number. A fifth of the rows is for validation; all columns have mean 0 and variance 1 in training.

    So the loss of the best constant is about 1.
    """

    def __init__(self, config: TabularConfig) -> None:
        self.config = config
        rows = _scikit_learn(config.table) if config.data is None else _read(config.data)
        held_out = max(1, round(VALIDATION_SHARE * len(rows)))
        require(len(rows) - held_out >= config.batch, "batch", config.batch, f"at most {len(rows) - held_out}")
        order = np.random.default_rng(0).permutation(len(rows))
        train, validation = rows[order[held_out:]], rows[order[:held_out]]
        mean, std = train.mean(axis=0), train.std(axis=0)
        require(std[-1] > 0, "data", config.data or config.table, "a table whose target varies")
        std[std == 0] = 1.0
        self._train, self._validation = (
            torch.from_numpy(((part - mean) / std).astype(np.float32)) for part in (train, validation)
        )

    def model(self, seed: int) -> nn.Module:
        config, columns = self.config, self._train.shape[1] - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules: list[nn.Module] = []
            for _ in range(config.layers):
                modules += [nn.Linear(columns, config.width), nn.ReLU()]
                columns = config.width
            return nn.Sequential(*modules, nn.Linear(columns, 1))

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs, float32 of shape (batch, columns), and targets, of shape (batch, 1): rows drawn at random."""
        size = self.config.batch
        rows = self._train[np.random.default_rng((seed, step)).choice(len(self._train), size, replace=False)]
        return rows[:, :-1], rows[:, -1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error, as a share of the target's variance."""
        example = next(model.parameters())
        inputs, targets = (tensor.to(example.device, example.dtype) for tensor in batch)
        return F.mse_loss(model(inputs), targets)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.loss(model, (self._validation[:, :-1], self._validation[:, -1:])).item()}

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part in (self._train, self._validation):
            digest.update(part.numpy().data)
        data = self.config.data
        return {
            "task": "tabular",
            "source": f"scikit-learn's {self.config.table}" if data is None else Path(data).name,
            "sha256": digest.hexdigest(),
            "rows": len(self._train),
            "validation_rows": len(self._validation),
        }


def _scikit_learn(table: str) -> Rows:
    from sklearn import datasets

    inputs, targets = getattr(datasets, f"load_{table}")(return_X_y=True)
    return np.column_stack([inputs, targets]).astype(np.float64)


def _read(path: str) -> Rows:
    allowed = "a file of comma-separated numbers under one line of names"
    try:
        rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"data must be {allowed}, got {path!r}: {error}") from None
    fits = rows.shape[0] >= 2 and rows.shape[1] >= 2 and bool(np.isfinite(rows).all())
    require(fits, "data", path, f"{allowed}, with 2 rows and 2 columns or more, all finite")
    return rows
