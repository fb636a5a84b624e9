from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mada_lab.sweep.pool import Pool

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    shared = Path(os.environ.get("MADA_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "tiny_shakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set MADA_SHARED to the folder that holds data/{path.name}")
    return path


@pytest.fixture(scope="module")
def without_ray() -> Iterator[None]:
    """What a sweep calls is called here, one after the other. Ray takes seconds to start; test_pool.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "run", Pool.run_here)
        yield
