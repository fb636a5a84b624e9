"""What the documentation says in code is true. That the pages build, and their links lead somewhere: make docs."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from problems import Net, train
from torch import nn

import mada_optim
from mada_optim import MADA, OMADA, AVGrad, load_optimizer

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ROW = re.compile(r"^\| `(?P<code>.+?\(params.*?\))` \| (?P<count>\d) \| (?P<names>.+) \|$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.+?)^```$", re.MULTILINE | re.DOTALL)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEMORY = [match.groups() for match in ROW.finditer((DOCS / "memory.md").read_text("utf-8"))]


def test_the_table_of_memory_is_read():
    assert len(MEMORY) == 12


@pytest.mark.parametrize(("code", "count", "names"), MEMORY, ids=[code for code, *_ in MEMORY])
def test_the_table_of_memory(code: str, count: str, names: str):
    weight = nn.Parameter(torch.ones(5, 3))
    known = {"MADA": MADA, "OMADA": OMADA, "AVGrad": AVGrad, "load_optimizer": load_optimizer}
    optimizer = eval(code, known | {"params": [weight]})
    weight.grad = torch.ones(5, 3)
    optimizer.step()
    state = optimizer.state[weight]
    buffers = {name for name, value in state.items() if value.shape == weight.shape}
    assert buffers == set(re.findall(r"`(\w+)`", names))
    assert len(buffers) == int(count)
    assert all(state[name].dtype == torch.float32 for name in buffers)


@pytest.mark.parametrize("page", PAGES)
def test_code_on_a_page_runs(page: str):
    """Blocks that are not taken from examples, one after the other, with a model and an optimizer at hand."""
    text = (DOCS / page).read_text("utf-8")
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 2)
    names = {**vars(mada_optim), "model": model, "optimizer": optimizer}
    for block in BLOCK.findall(text):
        if "--8<--" not in block:
            exec(block, names)


def test_every_public_name_is_in_the_reference():
    from mada_optim import integrations

    listed = set(re.findall(r"^::: mada_optim\.(\S+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE))
    public = {*mada_optim.__all__, *(f"integrations.{name}" for name in integrations.__all__)}
    for path in _framework_modules():
        (names,) = re.findall(r"^__all__ = (\[.*?\])", path.read_text("utf-8"), re.MULTILINE)
        public |= {f"integrations.{path.stem}.{name}" for name in ast.literal_eval(names)}
    assert listed == public


def _framework_modules() -> list[Path]:
    return [p for p in Path(mada_optim.__file__).parent.glob("integrations/*.py") if p.stem != "__init__"]


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    convert = load(DOCS / "_docstrings.py").as_markdown
    assert convert("See :meth:`Family.update` and ``x``::\n\n    y\n") == "See `Family.update` and `x`:\n\n    y\n"
    assert (
        convert("Text.\n\n>>> f(\n...     1)\n2\n\nMore.") == "Text.\n\n```pycon\n>>> f(\n...     1)\n2\n```\n\nMore."
    )
    both = "Args:\n    a, b: as\n        there.\n    c: here."
    assert convert(both) == "Args:\n    a: as\n        there.\n    b: as\n        there.\n    c: here."


def test_the_readmes_table_of_losses_is_the_one_that_was_made():
    """But for the names of the tasks, which are shorter."""
    made = [line for line in (DOCS / "results" / "three-tasks.md").read_text("utf-8").splitlines() if line[:1] == "|"]
    readme = (DOCS.parent / "README.md").read_text("utf-8").splitlines()
    assert len(made) == 2 + 17
    assert all(line in readme for line in made[1:])
