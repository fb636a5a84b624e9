from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    shared = Path(os.environ.get("MADA_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "tiny_shakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set MADA_SHARED to the folder that holds data/{path.name}")
    return path
