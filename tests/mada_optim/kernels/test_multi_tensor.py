"""Kernels in Triton for all parameters at once, in Triton's interpreter; benchmarks/gpu_check.py has them on a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import FLOAT32, assert_same, run
from problems import IDS, TABLE, Net, Row, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mada_optim import MADA, OMADA, Coefficient, Family, HypergradientOptimizer, OMADAFamily
from mada_optim.engine import group_step as engine
from mada_optim.kernels import select
from mada_optim.kernels.triton import columns, launch, multi_tensor
from mada_optim.kernels.triton.multi_tensor import TritonExecutor
from mada_optim.kernels.triton.scalars import change_numbers
from mada_optim.learning.rule import LearnedTensors, LearningRule, call

TESTS = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(
        not launch.is_available() or torch.cuda.is_available(), reason="needs Triton, and no GPU: its interpreter"
    ),
    # Of numpy, in which the interpreter computes.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture
def launches(monkeypatch):
    """Makes the kernels those of a GPU, with blocks that suit the interpreter; the number of launches so far."""
    count = [0]
    original = launch.Kernel.launch

    def counted(*args, **kwargs):
        count[0] += 1
        original(*args, **kwargs)

    monkeypatch.setattr(launch.Kernel, "launch", counted)
    monkeypatch.setattr(engine, "select_executor", lambda family, *_: select.the(TritonExecutor))
    monkeypatch.setattr(multi_tensor, "TILE", 1 << 15)
    monkeypatch.setattr(multi_tensor, "BLOCK", 1 << 14)
    return count


def plain(row: Row, dtype: torch.dtype, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "select_executor", select.select_executor)
        return run(row, dtype, fused=False, **kwargs)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_agrees_with_plain(row: Row, launches):
    assert_same(run(row, torch.float64), plain(row, torch.float64), 1e-12)
    assert launches[0] > 0


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.name in ("lion", "mada-paper", "omada")], ids=lambda row: row.name
)
def test_agrees_with_plain_in_float32(row: Row, launches):
    """With coefficients that hardly move: what they learn amplifies rounding."""
    settings = {"hyper_lr": 1e-6} if row.learns else {}
    assert_same(run(row, torch.float32, **settings), plain(row, torch.float32, **settings), FLOAT32)
    assert launches[0] > 0


@pytest.mark.parametrize("settings", [{"maximize": True}, {"lr": torch.tensor(3e-3)}, {"weight_decay": 0.3}], ids=str)
def test_settings(settings, launches):
    results = []
    for kernels in (engine.select_executor, select.select_executor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "select_executor", kernels)
            model = Net(torch.float64)
            train(model, MADA(model.parameters(), **{"lr": 1e-2, "hyper_warmup": 2, **settings}), 8)
            results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    assert launches[0] > 0


def test_complex_and_half_precision_parameters(launches):
    """Not bfloat16, to which the interpreter does not round but cuts."""
    for dtype, rtol in ((torch.complex64, 1e-5), (torch.float16, 1e-3)):
        results = []
        for kernels in (engine.select_executor, select.select_executor):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "select_executor", kernels)
                generator = torch.Generator().manual_seed(0)
                params = [nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in (3, 200)]
                optimizer = MADA(params, lr=1e-2, hyper_warmup=0)
                for _ in range(6):
                    for param in params:
                        param.grad = torch.randn(param.shape, generator=generator, dtype=dtype)
                    optimizer.step()
                results.append(params)
        torch.testing.assert_close(*results, rtol=rtol, atol=rtol)
    assert launches[0] > 0


def test_parameters_that_are_spread_over_processes(launches, tmp_path, monkeypatch):
    """The part that is here is worked on where it lies, empty parts included."""
    monkeypatch.setattr(columns, "_with_copies", lambda _, numbers: pytest.fail("copied") if numbers else [])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh, results = init_device_mesh("cpu", (1,)), []
        for kernels in (engine.select_executor, select.select_executor):
            monkeypatch.setattr(engine, "select_executor", kernels)
            generator = torch.Generator().manual_seed(0)

            def random(*shape: int, generator=generator):
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                return distribute_tensor(values, mesh, [Shard(0)])

            params = [nn.Parameter(random(*shape)) for shape in ((8, 4), (3,), (0, 2))]
            optimizer = MADA(params, lr=1e-2, hyper_warmup=0)
            for _ in range(4):
                for param in params:
                    param.grad = random(*param.shape)
                optimizer.step()
            results.append([param.full_tensor() for param in params])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    finally:
        dist.destroy_process_group()
    assert launches[0] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hyper_lr": 0.0}, 2),  # numbers, tensors
        ({"hyper_delay": 0}, 6),  # numbers, tensors, sums; what is learned; numbers, tensors
        ({"hyper_delay": 1}, 4),  # what is learned; numbers, tensors, sums
    ],
    ids=str,
)
def test_as_many_launches_for_many_parameters_as_for_one(options, expected, launches):
    counts = []
    for number in (1, 20):
        params = [nn.Parameter(torch.randn(3 + index)) for index in range(number)]
        optimizer = MADA(params, hyper_warmup=0, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            before = launches[0]
            optimizer.step()
        counts.append(launches[0] - before)
    assert counts == [expected] * 2


def test_a_tile_leaves_one_number_for_each_coefficient(launches, monkeypatch):
    """However many sums a derivative consists of; and one program for each coefficient adds them up."""
    params = [nn.Parameter(torch.randn(size)) for size in (5, (1 << 15) + 1)]
    learned = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "gamma": 0.1}
    optimizer = MADA(params, hyper_warmup=0, hyper_lr=learned, hyper_delay=0)
    programs = []
    counted = launch.Kernel.launch
    monkeypatch.setattr(
        launch.Kernel, "launch", lambda *args, **kwargs: (programs.append(args[2]), counted(*args, **kwargs))
    )
    for _ in range(2):
        programs.clear()
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    tiles, coefficients = 3, 6
    assert programs == [1, tiles, coefficients, 1, 1, tiles]


def test_elements_are_not_divided_by_numbers(launches, monkeypatch):
    """But multiplied by their reciprocals. One quotient is left: the direction is one of two averages."""
    sources = []
    load = multi_tensor.load
    monkeypatch.setattr(multi_tensor, "load", lambda source: (sources.append(source), load(source))[1])
    x = nn.Parameter(torch.ones(3))
    optimizer = MADA([x], hyper_lr=0.0, eps=3e-8)  # no kernel of another test
    x.grad = torch.ones(3)
    optimizer.step()
    (source,) = (source for source in sources if "BLOCK" in source)
    assert len({line.strip() for line in source.splitlines() if line.strip().startswith("x") and " / " in line}) == 1


def test_tensors_that_are_not_aligned(launches, monkeypatch):
    """Their tiles are read one by one in a launch of their own, which leaves the tiles of all others alone."""
    monkeypatch.setattr(multi_tensor, "TILE", 64)
    monkeypatch.setattr(multi_tensor, "BLOCK", 16)
    results, counts = [], []
    for elements in (0, 1):  # in front of the second parameter
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(size, generator=generator) for size in (70, 150, 3)]
        memory = torch.empty(150 + elements)
        params = [nn.Parameter(x) for x in (values[0], memory[elements:].copy_(values[1]), values[2])]
        optimizer = MADA(params, lr=1e-2, hyper_warmup=0)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            before = launches[0]
            optimizer.step()
        counts.append(launches[0] - before)
        results.append((params, optimizer.coefficients()))
    assert counts == [3, 4]  # numbers, tensors, sums
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("make", [MADA, partial(OMADA, scale=False)], ids=["mada", "omada"])
def test_stochastic_rounding_is_right_on_average(make, launches, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    x = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = make([x], lr=1e-5, hyper_lr=0.0, state_dtype=torch.bfloat16, stochastic_rounding=True)
    for _ in range(100):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert 1.0 - float(x.detach().double().mean()) == pytest.approx(0.001, rel=0.1)
    assert launches[0] > 0


@pytest.mark.parametrize("row_norm", [{"row_norm": 1.0}, {"hyper_lr": {"ortho": 0.1, "row_norm": 0.1}}], ids=str)
def test_normalized_rows_agree_with_plain(row_norm, launches):
    """The numbers of the rows are no concern of the kernels."""
    results = []
    for kernels in (engine.select_executor, select.select_executor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "select_executor", kernels)
            generator = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 9), (9, 4))]
            groups = [{"params": params, "matrices": True}]
            optimizer = OMADA(groups, lr=1e-2, ortho=0.6, scale=False, fused=None, **row_norm)
            for _ in range(5):
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator)
                optimizer.step()
            results.append((params, optimizer.coefficients()))
    torch.testing.assert_close(results[0], results[1], rtol=FLOAT32, atol=FLOAT32)
    assert launches[0] > 0


def test_gradients_that_are_not_finite_are_not_hidden(launches):
    x = nn.Parameter(torch.zeros(40))
    optimizer = MADA([x], hyper_warmup=0)
    for value in (1.0, float("inf"), float("nan")):
        x.grad = torch.ones_like(x)
        x.grad[7] = value
        optimizer.step()
    assert bool(x.isnan()[7])
    assert not x.isnan()[:7].any()
    assert optimizer.skipped_hypergradients > 0
    assert launches[0] > 0


class ManyOperations(Family):
    """A family that uses what MADA's does not."""

    coefficients = (
        Coefficient("beta", 0.9, (0.0, 0.99), 1e-3, domain=(0.0, 1.0)),
        Coefficient("sharpness", 1.5, (0.5, 3.0), 1e-3),
    )

    def buffers(self, q):
        return ("count", "x 1")  # names that would not do in a program

    def update(self, state, grad, q, step):
        momentum = q["beta"] * state["count"] + (1 - q["beta"]) * grad
        largest = torch.maximum(state["x 1"], grad.abs()).clamp(min=1e-6)
        soft = torch.sigmoid(q["sharpness"] * momentum) - torch.exp(-(momentum**2)) + torch.log(1 + momentum.abs())
        scaled = (momentum.abs() / largest + 0.1) ** q["sharpness"] + torch.tanh(momentum) ** 3
        small = torch.minimum(scaled, torch.relu(soft)) / torch.rsqrt(1 + step)
        # Of limits in the wrong order, the upper one holds.
        odd = soft.reciprocal().clamp(-2, 2) + grad.clamp(0.5, 0.2) + torch.sqrt(largest) ** -1
        chosen = torch.where(torch.logical_and(grad > 0, ~(momentum < 0)), small, odd)
        return chosen + 2.0**-momentum, {"count": momentum, "x 1": largest}


class Unknown(ManyOperations):
    """One with an operation for which there is no Triton here."""

    def update(self, state, grad, q, step):
        direction, new = super().update(state, grad, q, step)
        return torch.erf(direction), new


def _row(family: Family) -> Row:
    return Row(family.name, partial(HypergradientOptimizer, family=family, hyper_warmup=0), {}, 0, learns=True)


class Kept(ManyOperations):
    """One that keeps a buffer as it is, goes through float64, and whose derivative by a coefficient is 0."""

    def update(self, state, grad, q, step):
        momentum = q["beta"] * state["count"] + (1 - q["beta"]) * grad
        return torch.sign(momentum.double() - q["sharpness"]), {"count": momentum, "x 1": state["x 1"]}


def in_every_launch(row: Row, launches: list[int]) -> None:
    """As many launches as MADA's own family has: neither the step nor its derivative is left to torch.compile."""
    found = run(row, torch.float64)
    row_launches, launches[0] = launches[0], 0
    run(next(row for row in TABLE if row.name == "mada-paper"), torch.float64)
    assert row_launches == launches[0]
    assert_same(found, plain(row, torch.float64), 1e-11)


@pytest.mark.parametrize("family", [ManyOperations(), Kept()], ids=lambda family: family.name)
def test_a_family_with_other_operations(family, launches):
    in_every_launch(_row(family), launches)


def _compile_nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


def test_what_cannot_be_written_is_left_to_torch_compile(launches, monkeypatch):
    _compile_nothing(monkeypatch)
    row = _row(Unknown())
    assert_same(run(row, torch.float64, hyper_lr=0.0), plain(row, torch.float64, hyper_lr=0.0), 1e-11)
    assert launches[0] == 0


def test_copies_are_made_anew_where_part_is_left_to_torch_compile(launches, monkeypatch):
    """Buffers that lie otherwise than their parameter are worked on in copies, of which torch.compile knows nothing."""
    _compile_nothing(monkeypatch)
    original = multi_tensor._Kernel

    def settle_is_refused(parts, *args):
        if parts.sums:
            raise multi_tensor.UnsupportedError("here")
        return original(parts, *args)

    results = []
    for kernels in (engine.select_executor, select.select_executor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "select_executor", kernels)
            patch.setattr(multi_tensor, "_Kernel", settle_is_refused)
            generator = torch.Generator().manual_seed(0)
            x = nn.Parameter(torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64))
            optimizer = _row(type("Relaid", (ManyOperations,), {})())([x], lr=1e-2)
            for step in range(5):
                if step == 2:
                    x.data = x.data.to(memory_format=torch.channels_last)
                x.grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                optimizer.step()
            results.append(x.detach())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    assert launches[0] > 0


PLAIN = tuple(Coefficient(name, 0.5, (0.0, 1.0), 0.1) for name in "abc")
OF_KINDS = (*(dataclasses.replace(coefficient, normalized=True) for coefficient in PLAIN[:2]), PLAIN[2])


@pytest.mark.parametrize("kinds", [PLAIN, OF_KINDS], ids=["plain", "of kinds"])
@pytest.mark.parametrize("due", [True, torch.tensor(True), torch.tensor(False)], ids=str)
@pytest.mark.parametrize("h", [(0.1, -7.0, 0.25), (float("nan"), 1.0, 1.0), (1.0, float("inf"), 0.0)], ids=str)
def test_learning_in_one_launch(kinds, due, h, launches):
    rule = LearningRule(momentum=0.9, clip=2.0, warmup=0, every=1)
    results = []
    for runner in (change_numbers, call):
        rows = ([0.5] * 3, [0.1, 0.0, 3.0], [0.2] * 3)
        learned = LearnedTensors(*(torch.tensor(row, dtype=torch.float64) for row in rows), torch.tensor(3))
        skipped = torch.tensor(0)
        gradient, boxes = torch.tensor(h, dtype=torch.float64), [(0.48, 0.9), (0.0, 0.52), (0.1, 0.49)]
        rule.learn(learned, skipped, gradient, kinds, [0.1, 0.1, 0.01], boxes, due, runner)
        results.append((learned.values, learned.momentum, learned.square, learned.taken, skipped))
    assert launches[0] == 1
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


def test_all_of_it_compiles_for_a_gpu():
    """The interpreter knows no types that do not fit together, and rounds otherwise."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(TESTS), str(TESTS / "mada_optim" / "kernels"), environment.get("PYTHONPATH", "")]
    command = [sys.executable, str(TESTS / "mada_optim" / "kernels" / "compile_for_gpu.py")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels compiled" in done.stdout


def test_state_of_another_shape_is_refused_before_memory_is_touched(launches):
    x = nn.Parameter(torch.ones(6))
    optimizer = MADA([x], hyper_lr=0.0)
    x.grad = torch.ones(6)
    optimizer.step()
    optimizer.state[x]["exp_avg"] = torch.zeros(2)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=r"exp_avg \(2,\)"):
        optimizer.step()
    assert torch.equal(x.detach(), before)


def test_selected_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(select, "why_unavailable", lambda: None)
    group = dict(MADA([nn.Parameter(torch.ones(1))]).param_groups[0])
    for device, capturable, triton, expected in (
        ("cuda", False, True, TritonExecutor),
        ("cuda", True, True, TritonExecutor),
        ("cuda", False, False, select.CompiledExecutor),
        ("cpu", False, True, select.NativeExecutor),
    ):
        monkeypatch.setattr(launch, "is_available", lambda triton=triton: triton)
        group["capturable"] = capturable
        assert type(select.select_executor(OMADAFamily(), group, torch.device(device))) is expected
