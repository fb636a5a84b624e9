"""Every gate of make check can fail, the sdist holds what its tests need, links and paths in documents lead there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mada_optim

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

GOOD = '''"""A module."""


def half(number: float) -> float:
    """Return half of a number.

    Args:
        number: any.
    """
    return number / 2
'''
# One fault for each gate: an unused import, spaces, a wrong type, a description without the name of its argument.
BAD = f"import os\n{GOOD.replace('number / 2', 'str(number  )').replace('number: any', 'Any')}"
PAGE = "# Index\n\n::: mada_optim.half\n"
DEAD_LINKS = "[a page](nowhere.md) [a heading](#nowhere)\n"


def check(folder: Path, module: str, page: str, lowest: str = GOOD) -> subprocess.CompletedProcess[str]:
    """Run make check, with this project's settings, on a project of one page, and of packages with little in them.

    Args:
        folder: where to make it.
        module: source of the package mada_optim itself.
        page: source of the page.
        lowest: source of the library's lowest layer.
    """
    tools = ("ruff", "mypy", "mkdocs", "lint-imports")
    if shutil.which("make") is None or not all((BIN / name).exists() for name in tools):
        pytest.skip(f"needs make, {', '.join(tools)}")
    settings = ("Makefile", "pyproject.toml", "constraints.txt", "mada-optax/pyproject.toml", "docs/_docstrings.py")
    settings += ("docs/_site.py",)
    for name in settings:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    for package in ("src/mada_optim", "src/mada_lab", "mada-optax/src/mada_optax"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(module if package == "src/mada_optim" else GOOD)
    contracts = (REPOSITORY / "pyproject.toml").read_text("utf-8").partition("[tool.importlinter]")[2]
    for contract in contracts.split("[[tool.importlinter.contracts]]"):
        for container in re.findall(r'^containers = \["(\w+)"\]', contract, re.MULTILINE):
            for name in re.findall(r'^    "([^"]+)",', contract, re.MULTILINE):
                for part in re.split(r"[ :|]+", name):
                    path = folder / "src" / container / f"{part}.py"
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(GOOD)
    (folder / "src" / "mada_optim" / "warn.py").write_text(lowest)
    (folder / "docs" / "index.md").write_text(page)
    (folder / "mkdocs.yml").write_text(f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\nnav: [index.md]\n")
    (folder / "installed").touch()
    # Not the flags of a make that runs these tests.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "--keep-going", "check", f"BIN={BIN}", "STAMP=installed"]
    return subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def test_make_check_passes_where_nothing_is_wrong(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD, PAGE)
    assert done.returncode == 0, done.stdout


def test_every_gate_of_make_check_fails(tmp_path: Path) -> None:
    out = check(tmp_path, BAD, PAGE + DEAD_LINKS, lowest=f"{GOOD}\n\nimport mada_lab.cli  # noqa\n").stdout
    assert re.findall(r"\*\*\* \[(?:Makefile:\d+: )?(\w+)\] Error", out) == [
        "lint",
        "layout",
        "layers",
        "types",
        "docs",
    ], out
    for message in (
        "F401",
        "would be reformatted",
        "mada_optim.warn -> mada_lab",
        "Incompatible return value",
        "Aborted with 3 warnings in strict mode",
    ):
        assert message in out


def test_the_sdist_has_every_file_of_the_repository(tmp_path: Path) -> None:
    """But for the archives of results, which no test reads and which are two thirds of its size."""
    pytest.importorskip("setuptools", "77")
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout")
    command = ["-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    packed = set((tmp_path / "mada_optim.egg-info" / "SOURCES.txt").read_text("utf-8").splitlines())
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    expected = {name for name in listed.split("\0") if name not in ("", ".gitignore") and not name.endswith(".tar.gz")}
    assert len(expected) > 200
    assert expected - packed == set()


PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("benchmarks/**/*.md")]


@pytest.mark.parametrize("name", ["mada_optim", "mada_lab"])
def test_the_wheel_has_every_file_of_a_package(name: str) -> None:
    """Files that are no Python go into a wheel where pyproject.toml names them."""
    (named,) = re.findall(rf"^{name} = (\[.+\])$", (REPOSITORY / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    package = REPOSITORY / "src" / name
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert set(ast.literal_eval(named)) == files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_between_files_lead_there(page: Path) -> None:
    """On pages that mkdocs does not build."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


# A path between backticks: it has a slash, or the ending of a file.
NAMED_PATH = re.compile(r"`([\w.-]+/[\w./-]*|[\w-]+\.(?:py|cpp|md|toml|yml))`")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_paths_that_a_document_names_exist(page: str) -> None:
    """From the repository, or from a folder in it."""
    folders = ("src", "tests", "docs", "examples", "experiments", "benchmarks", "mada-optax")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
    files += [*REPOSITORY.glob("*"), *map(REPOSITORY.joinpath, folders)]
    known = ["/" + path.relative_to(REPOSITORY).as_posix() for path in files]
    named = NAMED_PATH.findall((REPOSITORY / page).read_text("utf-8"))
    assert len(named) > 25
    assert [path for path in named if not any(each.endswith("/" + path.rstrip("/")) for each in known)] == []


def test_the_citation_is_of_this_version() -> None:
    """And cites the paper as README.md does."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == mada_optim.__version__
    released = re.findall(r"^## ([\d.]+) - ([\d-]+)$", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert (citation["version"], citation["date-released"]) in released
    (paper,) = citation["references"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{authors}}}" in " ".join((REPOSITORY / "README.md").read_text("utf-8").split())


@pytest.mark.parametrize(
    "form", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda form: form.stem
)
def test_an_issue_form_asks_for_something(form: Path) -> None:
    """GitHub ignores a form without these fields, or in which two fields have one id."""
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(form.read_text("utf-8"))
    assert content.keys() >= {"name", "description", "body"}
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 2
    assert all(field["attributes"]["label"] for field in fields)
