from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Arithmetic in float64, as the comparisons need it. Off for all others, since it is off for users."""
    with jax.enable_x64(True):
        yield
