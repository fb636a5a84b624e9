"""The benchmark runs, and its words are those that the state shows. (What it measures is not tested.)"""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from torch import nn

from mada_optim.bench import contenders, measure, workloads
from mada_optim.cli import main


@pytest.fixture
def small(monkeypatch):
    """Workloads of a size for tests."""
    shapes = [(40, 50), (7,)]
    monkeypatch.setitem(workloads.WORKLOADS, "a", lambda device: workloads.Tensors(device, "small tensors", shapes))
    monkeypatch.setattr(measure, "COPIED", 1000)


@pytest.mark.usefixtures("small")
def test_bench_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "bench"
    assert main(["bench", "--workloads", "a", "--seconds", "0", "--only", "A", "--out", str(out)]) == 0
    stored = json.loads((out / "results.json").read_text())
    names = [result["name"] for result in stored["results"]]
    assert {"AdamW, fused", "MADA, everything", "Adan (pytorch-optimizer)"} <= set(names)
    assert stored["machine"]["versions"]["torch"] == version("torch")
    for result in stored["results"]:
        assert result["low"] <= result["ratio"] <= result["high"]
        assert result["rounds"] >= 5
    printed, table = capsys.readouterr().out, (out / "table.md").read_text()
    for name in names:
        assert name in printed
        assert name in table
    assert (out / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(("arguments", "message"), [(["--workloads", "ax"], "'ax'"), (["--only", "Frodo"], "'Frodo'")])
def test_wrong_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "COPIED", 1000)
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_words_are_those_of_the_buffers():
    """What the table says a step moves follows from the buffers that the optimizer has."""
    for contender in contenders.contenders():
        if contender.kind != "ours" or contender.words is None or contender.make is None:
            continue
        param = nn.Parameter(torch.zeros(3, 4))
        optimizer = contender.make([param])
        for _ in range(2):
            param.grad = torch.ones(3, 4)
            optimizer.step()
        tensors = {k: v for k, v in optimizer.state[param].items() if v.shape == param.shape}
        learning = "pending_grad" in tensors
        buffers = len(tensors) - learning
        kept = int("previous_grad" in tensors)
        assert contender.words == contenders.words(buffers, kept, learning, contender.unit), contender.name


def test_gpt2_has_the_tensors_that_it_should():
    shapes = workloads.gpt2_shapes()
    assert len(shapes) == 148
    assert sum(shape.numel() for shape in shapes) == 124_439_808
