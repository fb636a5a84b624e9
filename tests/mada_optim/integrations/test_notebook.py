"""The notebook runs from top to bottom, and is stored with the pictures that it makes."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mada_optim import MADA, OMADA

NOTEBOOK = Path(importlib.import_module("characters").__file__ or "").parent / "what_it_became.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pyplot, without windows."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    yield pyplot
    pyplot.close("all")


def test_the_notebook_runs(figures: Any) -> None:
    """Each cell as it stands, but for the number of steps; the value of a last expression is what is shown."""
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for cell in CELLS:
        tree = ast.parse(source(cell).replace("STEPS = 300", "STEPS = 5"))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
    assert (type(names["omada"]), type(names["mada"])) == (OMADA, MADA)
    assert len(names["mada_losses"]) == names["mada_history"].steps == 5
    assert len(figures.get_fignums()) == 3
    assert names["omada"] in shown
    assert shown[-1]["step"] == 5


def test_the_notebook_is_stored_with_what_it_shows() -> None:
    kinds = [[kind for output in cell["outputs"] for kind in output.get("data", {})] for cell in CELLS]
    shown = {source(cell).split("\n")[-1]: found for cell, found in zip(CELLS, kinds, strict=True)}
    for line in ("pyplot.show()", "omada_history.plot();", "mada_history.plot();"):
        assert "image/png" in shown[line]
    assert "text/html" in shown["omada"]
    assert not any(output["output_type"] in ("error", "stream") for cell in CELLS for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 300_000
