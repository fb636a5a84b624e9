"""``nox``: the core of the tests, with the oldest and the newest Python and torch that are supported.

Each session installs the package, one version of torch, and what the tests in ``tests/core.txt`` import. A Python that
is not on the machine is skipped. ``nox --session core --python 3.10`` runs one Python with both versions of torch.
"""

from __future__ import annotations

import nox

OLDEST_TORCH = "torch==2.9.*"
NEWEST_TORCH = "torch"


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("torch", [OLDEST_TORCH, NEWEST_TORCH], ids=["oldest", "newest"])
def core(session: nox.Session, torch: str) -> None:
    """Test the core, without frameworks."""
    session.install(".", torch, "numpy", "pytest>=8", "hypothesis>=6")
    session.run("python", "-m", "pytest", *(session.posargs or ["@tests/core.txt"]))
