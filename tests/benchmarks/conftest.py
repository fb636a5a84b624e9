from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "mada_optim" / "kernels")]

from test_multi_tensor import launches  # noqa: E402, F401  a fixture
