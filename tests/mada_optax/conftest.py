from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

# The steps of the tests are tiny: compiling them well would take far longer than running them.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """Arithmetic in float64, as the comparisons need it. Off for all others, since it is off for users."""
    with jax.enable_x64(True):
        yield
