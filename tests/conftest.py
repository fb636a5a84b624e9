import os
import subprocess
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


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as it is built for a project with an address."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--quiet", "-f", str(TESTS.parent / "mkdocs.yml"), "-d", str(folder)]
    address = {"MADA_REPO_URL": "https://example.org/mada-optim", "MADA_EDIT_URI": "edit/main/docs/"}
    environment = {**os.environ, **address, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", *command], check=True, env=environment)
    return folder


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
