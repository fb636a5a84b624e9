"""What the tests of tricks share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import IDS, TABLE, Net, Row
from torch import Tensor

from mada_optim import HypergradientOptimizer

EVERY_ROW = pytest.mark.parametrize("row", TABLE, ids=IDS)
LEARNING = [row for row in TABLE if row.learns]
EVERY_LEARNING_ROW = pytest.mark.parametrize("row", LEARNING, ids=[row.name for row in LEARNING])


def everything(optimizer: HypergradientOptimizer) -> Any:
    """A copy of the parameters and of all numbers that the optimizer keeps."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if isinstance(v, (int, float, Tensor))} for g in saved["param_groups"]]
    return copy.deepcopy((params, saved["state"], groups))


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def pair(row: Row, dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[tuple[Net, HypergradientOptimizer]]:
    models = [Net(dtype), Net(dtype)]
    return [(model, row(model.parameters(), lr=1e-2, **kwargs)) for model in models]
