"""The benchmark runs, and its words are those that the state shows. (What it measures is not tested.)"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from importlib.metadata import version

import pytest
import torch
from torch import nn

from mada_lab.bench import contenders, measure, workloads
from mada_lab.cli.main import main
from mada_optim.engine import group_step
from mada_optim.matrices import Layout

PEERS = ("schedulefree", "pytorch_optimizer", "gradient_descent_the_ultimate_optimizer")


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "ax"], "workloads must be letters of abcdefghijk, got 'ax'"),
        (["--only", "Frodo"], "only must be part of a contender's name, got 'Frodo'"),
        (["--only", "gdtuo", "--workloads", "ab"], "runs on workloads ab, got 'gdtuo'"),
        (["--only", "OMADA", "--workloads", "de"], "runs on workloads de, got 'OMADA'"),
        (["--device", "mps"], "device must be cpu or cuda, got 'mps'"),
        (["--threads", "0"], "threads must be a positive integer, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tmp_path, capsys):
    assert main(["bench", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "device must be one that torch can use here, got 'cuda'" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_peers_that_are_not_installed_are_left_out(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in PEERS else real(name, *a))
    monkeypatch.setattr(contenders, "_peer", lambda *_: pytest.fail("it is not installed"))
    arguments = ["bench", "--workloads", "a", "--seconds", "0", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--only", "A"]) == 0
    missing = "Left out: Adan (pytorch-optimizer). pytorch_optimizer is missing: pip install 'mada-optim[bench]'"
    assert missing in capsys.readouterr().out
    assert main([*arguments, "--only", "Lion"]) == 2
    assert "a contender that is installed" in capsys.readouterr().err


def test_many_small_tensors_are_compared_with_foreach(tmp_path, capsys, monkeypatch):
    """Workloads of their own, with the implementation that people use for them as the baseline."""
    groups = [[(3,), (2, 2)], [(4,)]]
    few = partial(workloads.ManyTensors, title="a few tensors", groups=groups)
    monkeypatch.setitem(workloads.WORKLOADS, "f", few)
    monkeypatch.setattr(measure, "COPIED", 1000)
    out = tmp_path / "bench"
    assert main(["bench", "--workloads", "f", "--seconds", "0", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["name"] for result in results] == [
        "AdamW, fused",
        "AdamW, foreach",
        "MADA, nothing learned (Adam)",
        "MADA, default",
        "MADA, everything",
    ]
    assert "a few tensors; ratios to AdamW, foreach" in capsys.readouterr().out
    assert "## (f) a few tensors; ratios to AdamW, foreach" in (out / "table.md").read_text()
    used = {contender.name: contender for contender in contenders.contenders()}[few("cpu").baseline].make(
        few("cpu").groups()
    )
    assert used.defaults["foreach"]
    assert [len(group["params"]) for group in used.param_groups] == [2, 1]
    assert used.param_groups[0]["lr"] > used.param_groups[1]["lr"]


@pytest.mark.parametrize(("letter", "groups", "tensors"), [("d", 1, 240), ("e", 1, 10_000), ("f", 60, 300)])
def test_how_many_small_tensors_there_are(letter, groups, tensors):
    given = workloads.WORKLOADS[letter]("cpu").groups()
    assert (len(given), sum(len(group["params"]) for group in given)) == (groups, tensors)


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
        delay = optimizer.param_groups[0]["hyper_delay"]
        assert contender.words == contenders.words(buffers, kept, learning, contender.unit, delay), contender.name


def test_one_tensor_alone_can_be_timed_with_each():
    """Matrices or none: then there is only one kind of parameters."""
    for contender in contenders.contenders():
        if contender.make is not None and "a" in contender.workloads and contender.kind == "ours":
            for shape in ((3, 4), (3,)):
                contender.make([nn.Parameter(torch.zeros(shape))])


def test_gpt2_has_the_tensors_that_it_should():
    shapes = workloads.gpt2_shapes()
    assert len(shapes) == 148
    assert sum(shape.numel() for shape in shapes) == 124_439_808


def test_orthogonalization_is_timed_beside_where_singular_values_arrive(tmp_path, capsys, monkeypatch):
    shapes = [(16, 16), (48, 16), (16, 48)]
    monkeypatch.setitem(workloads.WORKLOADS, "g", lambda device: workloads.Matrices(device, "few matrices", shapes))
    monkeypatch.setattr(measure, "COPIED", 1000)
    out = tmp_path / "bench"
    assert main(["bench", "--workloads", "g", "--seconds", "0", "--out", str(out)]) == 0
    results = {result["name"]: result for result in json.loads((out / "results.json").read_text())["results"]}
    assert list(results) == [
        "Muon's iteration, batched",
        "orthogonalize",
        "orthogonalize, Muon's iteration",
        "torch.optim.Muon, one by one",
        "SVD",
    ]
    for name, result in results.items():
        low, high = result["singular_values"]
        margin = 0.03 if "one by one" in name else 0.0  # of bfloat16
        assert 0.68 - margin <= low <= high <= 1.21 + margin, name
    assert results["SVD"]["singular_values"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert "values" in capsys.readouterr().out


def test_the_programs_time_is_that_of_kernels_for_a_gpu_that_are_not_launched(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    selected = group_step.select_executor
    few = partial(workloads.HostTime, title="few tensors", shapes=[(3,), (2, 2)])
    running = few("cpu").start(next(x for x in contenders.contenders() if x.name == "MADA, everything"))
    params = [param for group in running.optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        running.step()
    assert all(map(torch.equal, params, before))
    assert group_step.select_executor is selected

    monkeypatch.setitem(workloads.WORKLOADS, "k", few)
    monkeypatch.setattr(measure, "COPIED", 1000)
    arguments = ["bench", "--workloads", "k", "--seconds", "0", "--only", "nothing learned"]
    assert main([*arguments, "--out", str(tmp_path / "bench")]) == 0
    (result,) = json.loads((tmp_path / "bench" / "results.json").read_text())["results"]
    assert result["ratio"] == pytest.approx(result["seconds"] / result["baseline_seconds"])
    assert result["bandwidth"] is None
    digits = 3 if result["seconds"] < 1e-3 else 1  # microseconds, where it is so little
    assert f"{1e3 * result['seconds']:.{digits}f}" in capsys.readouterr().out


QKV = Layout(dim=1, parts=(1, 1, 1)).plain()


def test_training_steps_of_the_recipe_know_which_parameters_are_matrices():
    groups = workloads.WORKLOADS["j"]("cpu").groups()
    assert [(group["matrices"], group.get("split")) for group in groups] == [(True, None), (True, QKV), (False, None)]
    assert all(param.dim() == 2 for group in groups[:2] for param in group["params"])


@pytest.mark.parametrize(("letter", "count"), [("g", 24), ("h", 6), ("i", 8)])
def test_the_matrices_to_orthogonalize(letter, count):
    assert len(workloads.WORKLOADS[letter]("cpu").params) == count
