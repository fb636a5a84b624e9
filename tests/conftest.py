import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]

# Without a GPU, kernels in Triton run in its interpreter, which has to be said before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of most tests are tiny: waking other threads would cost more than the work.
torch.set_num_threads(1)

# The same examples every time, so that a failure points at the change; the other profile looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
