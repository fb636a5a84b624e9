"""Build the sdist and the wheel, install each into an empty environment, and use it there: ``make release``.

Nothing is downloaded. Each environment sees torch and its requirements in the one that runs this script. The sdist's
tests also see pytest, hypothesis and numpy. The check fails if mada-optim imports a package that it does not require.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DIST = REPOSITORY / "dist"

# Of the tests that need only the core, quick ones: they show that the sdist is whole.
TESTS = [
    "tests/mada_optim/families/test_families.py",
    "tests/mada_optim/learning/test_coefficients.py",
    "tests/mada_optim/learning/test_freezing.py",
    "tests/mada_optim/optimizers/test_matrix_groups.py",
]

USE = """
import importlib.metadata, pathlib, sys
import torch
import mada_optim

package = pathlib.Path(mada_optim.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").exists()
assert mada_optim.__version__ == importlib.metadata.version("mada-optim")
for make in (mada_optim.MADA, mada_optim.OMADA):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    inputs, losses = torch.randn(32, 4), []
    optimizer = make(model if make is mada_optim.OMADA else model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (make, losses)
print("imports, and trains with", importlib.metadata.version("torch"))
"""


def main() -> None:
    """Run all checks. The first that fails ends the script with an error."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, copied(folder / "source"))
        (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        core = linked(folder / "core", ["torch"])
        build = linked(folder / "build", ["setuptools"])
        testing = linked(folder / "testing", ["pytest", "hypothesis", "numpy"])
        use(environment(folder / "of-wheel", core), wheel)
        python = environment(folder / "of-sdist", core, build, testing)
        use(python, sdist)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        unpacked = folder / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(unpacked / "src")  # the tests are for what is installed
        run(python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, cwd=unpacked)
    print(f"{wheel.name} and {sdist.name} are ready, in {DIST.name}/.")


def run(*command: object, cwd: Path | None = None) -> None:
    """Run a command, and stop the script where it fails."""
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, check=True)


def copied(folder: Path) -> Path:
    """Copy the files of the repository that git knows, so that nothing else can end up in the sdist.

    Where there is no repository of git, such as in an unpacked sdist, copy all files but what make builds.
    """
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        built = shutil.ignore_patterns(".venv", ".git", "*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs")
        return Path(shutil.copytree(REPOSITORY, folder, ignore=built))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def linked(folder: Path, names: Iterable[str]) -> Path:
    """Fill a folder with links to installed distributions and to all that they require."""
    folder.mkdir()
    for distribution in requirements(names):
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / entry
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(entry))))
    return folder


def requirements(names: Iterable[str]) -> Iterator[metadata.Distribution]:
    """Yield the installed distributions of these names and of all that they require."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # required on other platforms
            continue
        yield distribution
        left += [re.split(r"[^\w.-]", text)[0] for text in distribution.requires or () if "extra ==" not in text]


def environment(folder: Path, *visible: Path) -> Path:
    """Make an environment in which nothing is installed but what lies in the folders; return its Python."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "visible.pth").write_text("".join(f"{path}\n" for path in visible))
    return folder / "bin" / "python"


def use(python: Path, package: Path) -> None:
    """Install a wheel or an sdist, train with it, and run the command without the packages of its extra."""
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-build-isolation", package)
    run(*pip, "check")
    run(python, "-c", USE)
    command = python.parent / "mada"
    run(command, "--version")
    run(command, "--help")
    done = subprocess.run([command, "train"], capture_output=True, text=True, check=False)
    if done.returncode != 2 or "pip install 'mada-optim[lab]'" not in done.stderr:
        raise SystemExit(f"mada train without the extra: exit code {done.returncode}, {done.stderr}")


if __name__ == "__main__":
    main()
