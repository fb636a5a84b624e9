from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mada_optim.experiments.pool import Pool

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    shared = Path(os.environ.get("MADA_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "tiny_shakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set MADA_SHARED to the folder that holds data/{path.name}")
    return path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One for all: it takes seconds to start."""
    with Pool(2) as pool:
        assert pool.run(lambda: "", {"first": ()}, lambda *_: None)
        yield
