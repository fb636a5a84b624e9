"""Deprecated: the command ``mada`` is ``python -m mada_lab`` now.

``torchrun -m mada_optim.cli train`` was documented. It goes on, with a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module


def main(argv: Sequence[str] | None = None) -> int:
    """Warn, and run the command ``mada``. Return its exit code."""
    warnings.warn("mada_optim.cli is deprecated; use python -m mada_lab", DeprecationWarning, stacklevel=2)
    # By its name: the library does not depend on the laboratory.
    return int(import_module("mada_lab.cli.main").main(argv))


if __name__ == "__main__":
    sys.exit(main())
