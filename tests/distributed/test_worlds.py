"""Several processes train as one does: the checks of ``checks.py`` in worlds of 2 and 4 processes."""

from __future__ import annotations

from functools import lru_cache

import checks
import pytest
import torch.distributed as dist
from worlds import run_world

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without distributed, or without gloo"
)
CHECKS = [value for name, value in vars(checks).items() if name.startswith("check_")]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory):
    return lru_cache(lambda size: run_world(size, CHECKS, tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("size", [2, 4])
def test_together(reports, size, check):
    if problem := reports(size)[check.__name__]:
        pytest.fail(problem, pytrace=False)
