"""Fused and plain kernels do the same, for every optimizer, dtype and layout, and say so when they cannot."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from problems import IDS, TABLE, Net, Row, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mada_optim import MADA, Coefficient, Family, HypergradientOptimizer
from mada_optim.horizon import BUFFERS, INITIAL, MEAN
from mada_optim.kernels import native, select
from mada_optim.kernels.rounding import round_stochastically

# Relative to the largest element: what a few float32 operations in another order may differ by after some steps.
FLOAT32 = 2e-5


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters of every kind of layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "scalar": random(),
        "vector": random(5),
        "matrix": random(17, 33),
        "large": random(70_001),
        "empty": random(0, 3),
        "transposed": random(9, 4).t(),
        "channels_last": random(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "strided": random(12, 8)[::2, 1::3],
        "ones": random(1, 6, 1),
    }


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Gradients that change from step to step, some of them in another layout than their parameter."""
    generator = torch.Generator().manual_seed(step + 1)
    for name, param in params.items():
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 1)
        param.grad = grad.to(param.dtype)
        if name == "matrix" and step % 2:
            param.grad = param.grad.t().contiguous().t()
        if name == "vector":
            param.grad = param.grad[:1].expand(5)


def run(row: Row, dtype: torch.dtype, steps: int = 7, **kwargs):
    params = {name: nn.Parameter(tensor) for name, tensor in layouts(dtype).items()}
    optimizer = row(params.values(), lr=1e-2, weight_decay=0.1, **kwargs)
    for step in range(steps):
        gradients(params, step)
        if step == 4:
            params["matrix"].grad = None
        optimizer.step()
    return params, optimizer


def assert_same(one, other, rtol: float) -> None:
    (params, optimizer), (other_params, other_optimizer) = one, other
    for name, param in params.items():
        scale = float(param.detach().abs().max()) if param.numel() else 1.0
        torch.testing.assert_close(
            param, other_params[name], rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (_, state), (_, other_state) in zip(optimizer.state.items(), other_optimizer.state.items(), strict=True):
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            if key == "pending_grad" and not state["pending"]:
                continue  # nothing is kept: what is there does not matter
            scale = float(value.double().abs().max()) if value.numel() else 1.0
            torch.testing.assert_close(
                value, other_state[key], rtol=0, atol=rtol * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
    for key, value in optimizer.coefficients().items():
        assert value == pytest.approx(other_optimizer.coefficients()[key], abs=max(rtol, 1e-12)), key


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, FLOAT32)], ids=str)
def test_native_agrees_with_plain(row: Row, dtype, rtol, maximize):
    # Steps of the coefficients amplify rounding; small ones keep the comparison about the kernels.
    small = {"hyper_lr": 1e-6} if row.learns else {}
    native_run = run(row, dtype, maximize=maximize, **small)
    assert_same(native_run, run(row, dtype, maximize=maximize, fused=False, **small), rtol)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_agrees_with_plain_in_half_precision(row: Row, dtype):
    """Parameters within one unit in the last place, buffers in float32.

    But where Lion's average of coarse numbers cancels to nothing but rounding, its sign may be either.
    """
    one, other = run(row, dtype, steps=2), run(row, dtype, steps=2, fused=False)
    for name, param in one[0].items():
        theirs = other[0][name]
        far = ~torch.isclose(param, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert int(far.sum()) <= (1 if row.q["gamma"] < 1 else 0), name
        torch.testing.assert_close(param, theirs, rtol=torch.finfo(dtype).eps, atol=2.1e-2)
    for state, other_state in zip(one[1].state.values(), other[1].state.values(), strict=True):
        for key, value in state.items():
            if key not in ("step", "pending"):
                assert value.dtype == (dtype if key == INITIAL else torch.float32)
                if key == MEAN:  # a tenth of what the parameters are apart
                    far = ~torch.isclose(value, other_state[key], rtol=0.1 * torch.finfo(dtype).eps, atol=1e-6)
                    assert int(far.sum()) <= 1
                    assert value.numel() == 0 or not torch.equal(value, state[INITIAL].float())
                else:
                    torch.testing.assert_close(value, other_state[key], rtol=FLOAT32, atol=1e-7)


@pytest.mark.parametrize("row", [row for row in TABLE if row.learns], ids=lambda row: row.name)
def test_native_hypergradient_agrees_with_autodiff(row: Row):
    ours = run(row, torch.float64)[1].hypergradients()
    theirs = run(row, torch.float64, fused=False)[1].hypergradients()
    assert ours is not None
    assert theirs is not None
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-9), name


def test_complex_parameters():
    def trained(fused):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        optimizer = MADA([x], lr=1e-2, hyper_warmup=0, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            (x * x.conj()).real.sum().backward()
            optimizer.step()
        return x

    torch.testing.assert_close(trained(None), trained(False), rtol=FLOAT32, atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            x = nn.Parameter(torch.linspace(-1, 1, 300_001))
            optimizer = MADA([x], lr=1e-2, hyper_warmup=0)
            for step in range(4):
                x.grad = torch.sin(x.detach() * (step + 1))
                optimizer.step()
        finally:
            torch.set_num_threads(1)
        results.append((x.detach(), optimizer.coefficients(), optimizer.hypergradients()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_the_native_kernels_are_the_default_here(monkeypatch):
    """Otherwise the comparisons above would compare the plain kernels with themselves."""
    calls = []
    load = native.load
    monkeypatch.setattr(native, "load", lambda variant: calls.append(variant) or load(variant))
    x = nn.Parameter(torch.ones(3))
    optimizer = MADA([x], hyper_warmup=0)
    for _ in range(2):
        x.grad = torch.ones(3)
        optimizer.step()
    assert calls
    calls.clear()
    optimizer = MADA([x], hyper_warmup=0, fused=False)
    for _ in range(2):
        optimizer.step()
    assert not calls


def test_a_new_variant_is_compiled_only_once(tmp_path, monkeypatch):
    """Coefficients, learning rates, step counts and shapes are not compiled in."""
    monkeypatch.setenv("MADA_CACHE_DIR", str(tmp_path))
    native.load.cache_clear()
    builds = []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda *args: builds.append(args) or build(*args))
    try:
        for size, lr, beta1 in ((3, 1e-3, 0.9), (1000, 1e-2, 0.8), (7, 0.5, 0.0)):
            params = [nn.Parameter(torch.ones(size + i)) for i in range(3)]
            optimizer = MADA(params, lr=lr, betas=(beta1, 0.9), hyper_lr=0.0)
            for step in range(4):
                optimizer.param_groups[0]["lr"] = lr / (step + 1)
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
        assert len(builds) == 1
        native.load.cache_clear()
        MADA(params, hyper_lr=0.0).step()
        assert len(builds) == 1, "a second process finds the library in the cache"
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".so"], "nothing else is left behind"
    finally:
        native.load.cache_clear()


WITHOUT_COMPILER = """
import warnings, torch
from mada_optim import MADA
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    for kwargs in ({}, {}, {"fused": False}):
        x = torch.nn.Parameter(torch.ones(5))
        optimizer = MADA([x], lr=0.1, hyper_warmup=0, **kwargs)
        for _ in range(3):
            x.grad = x.detach() * 2
            optimizer.step()
        print(x.tolist())
print(len(caught), caught[0].message)
try:
    MADA([x], fused=True)
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_there_is_one_warning_and_the_plain_kernels(tmp_path):
    env = {"CXX": "no-such-compiler", "MADA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True, check=True)
    first, second, plain, warning, refused = done.stdout.strip().splitlines()
    assert first == second == plain
    assert warning.startswith("1 MADA's fused kernels cannot be built")
    assert "no-such-compiler" in warning
    assert refused.startswith("fused=True needs a C++17 compiler (CXX): no C++ compiler found")


def test_a_compiler_that_fails_is_no_compiler(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho internal error >&2\nexit 1\n")
    broken.chmod(0o755)
    env = {"CXX": str(broken), "MADA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True, check=True)
    assert "internal error" in done.stdout


# ---- Memory: bfloat16 buffers and parameters.


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_bfloat16_state_halves_it_and_trains_alike(row: Row, fused):
    losses = []
    for state_dtype in (None, torch.bfloat16):
        model = Net(torch.float32)
        optimizer = row(model.parameters(), lr=1e-2, state_dtype=state_dtype, fused=fused)
        train(model, optimizer, 12)
        bits = 16 if state_dtype else 32
        for param in model.parameters():
            kept = {name: v for name, v in optimizer.state[param].items() if v.shape == param.shape and v.dim()}
            assert len(kept) == row.buffers
            assert all(kept.pop(name, param).dtype == torch.float32 for name in BUFFERS)
            assert all(torch.finfo(v.dtype).bits == bits for v in kept.values())
        losses.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("fused", [None, False])
def test_stochastic_rounding_keeps_what_nearest_loses(fused):
    """1000 steps of 1e-5 from 1.0: half a unit in the last place of bfloat16 is 0.002."""
    moved = {}
    for stochastic in (False, True):
        x = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = MADA([x], 1e-5, weight_decay=0.0, hyper_lr=0.0, stochastic_rounding=stochastic, fused=fused)
        for _ in range(1000):
            x.grad = torch.ones_like(x)
            optimizer.step()
        moved[stochastic] = 1.0 - float(x.detach().double().mean())
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("fused", [None, False])
def test_average_of_squares_in_bfloat16_does_not_stand_still(fused):
    """β2 = 0.999 moves v by a thousandth a step, less than bfloat16's last place: rounding to nearest would stop it."""
    x = nn.Parameter(torch.zeros(2048))
    optimizer = MADA([x], betas=(0.9, 0.999), hyper_lr=0.0, state_dtype=torch.bfloat16, fused=fused)
    for _ in range(1000):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert float(optimizer.state[x]["exp_avg_sq"].double().mean()) == pytest.approx(1 - 0.999**1000, rel=0.02)


def test_stochastic_rounding_is_exact_on_representable_values_and_special_ones():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 3.3895e38])
    expected = values.to(torch.bfloat16)
    for seed in range(20):
        torch.testing.assert_close(round_stochastically(values, seed)[:7], expected[:7], rtol=0, atol=0, equal_nan=True)
    assert len({tuple(round_stochastically(torch.rand(50), seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize("fused", [None, False])
def test_stochastic_rounding_resumes_bit_for_bit(fused):
    def make():
        model = Net(torch.float32).bfloat16()
        return model, MADA(model.parameters(), 1e-2, hyper_warmup=2, stochastic_rounding=True, fused=fused)

    model, optimizer = make()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 5, first=5)
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 5, first=5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_in_bfloat16_survives_a_checkpoint():
    model = Net(torch.float32)
    optimizer = MADA(model.parameters(), state_dtype=torch.bfloat16)
    train(model, optimizer, 3)
    other = MADA(model.parameters(), state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()}


# ---- torch.compile: any elementwise family. One small network for all tests: compiling is what takes the time.


class NesterovLike(Family):
    """A family of a user: momentum with a learned look ahead. No closed form exists for it."""

    coefficients = (
        Coefficient("beta", 0.9, (0.0, 0.99), 1e-2, domain=(0.0, 1.0)),
        Coefficient("look", 0.5, (0.0, 1.0), 1e-1),
    )

    def buffers(self, q):
        return ("momentum",)

    def update(self, state, grad, q, step):
        momentum = q["beta"] * state["momentum"] + (1 - q["beta"]) * grad
        corrected = momentum / (1 - q["beta"] ** step)
        return (1 - q["look"]) * corrected + q["look"] * grad, {"momentum": momentum}


def family_row(family: Family, **kwargs) -> Row:
    make = partial(HypergradientOptimizer, family=family, hyper_warmup=0, **kwargs)
    return Row(family.name, make, {"gamma": 1.0}, 0, learns=True)


@pytest.fixture(scope="module")
def _compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, FLOAT32), (torch.float64, 1e-12)], ids=str)
def test_compiled_agrees_with_plain(dtype, rtol):
    row = family_row(NesterovLike(), hyper_lr=1e-6)
    assert_same(run(row, dtype, fused=True), run(row, dtype, fused=False), rtol)


@pytest.mark.usefixtures("_compiled")
def test_compiled_mada_agrees_with_plain(monkeypatch):
    """What CUDA uses for MADA's own family, here on the CPU."""
    row = next(row for row in TABLE if row.name == "mada-paper")
    with monkeypatch.context() as patch:
        patch.setattr(select, "NativeKernels", select.CompiledKernels)
        compiled = run(row, torch.float32, fused=True, hyper_lr=1e-6)
    assert_same(compiled, run(row, torch.float32, fused=False, hyper_lr=1e-6), FLOAT32)


@pytest.mark.usefixtures("_compiled")
def test_compiled_stochastic_rounding():
    row = family_row(NesterovLike(), hyper_lr=0.0, state_dtype=torch.bfloat16, stochastic_rounding=True)
    x = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = row([x], lr=1e-5, fused=True)
    for _ in range(100):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert 1.0 - float(x.detach().double().mean()) == pytest.approx(0.001, rel=0.1)


@pytest.mark.usefixtures("_compiled")
def test_compiled_once_for_all_coefficients_rates_steps_and_shapes():
    row = family_row(NesterovLike())
    optimizers = []
    graphs = []
    for shapes in ([(30_000,), (7, 3)], [(5,)], [(200, 300), (9_000,), (4, 5, 6), ()], [(8_191,)], [(1,)]):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizers.append(row(params, lr=10.0 ** -len(shapes), fused=True, start={"beta": 0.1 * len(shapes)}))
        for step in range(4):
            optimizers[-1].param_groups[0]["lr"] /= step + 1
            for param in params:
                param.grad = torch.randn_like(param)
            optimizers[-1].step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs


def test_a_family_that_is_not_elementwise_is_not_compiled():
    class Normalized(NesterovLike):
        elementwise = False

        def update(self, state, grad, q, step):
            direction, new = super().update(state, grad, q, step)
            return direction / direction.norm(), new

    class Wrong(Normalized):
        elementwise = True

    with pytest.raises(RuntimeError, match="fused=True needs an elementwise family; Normalized is not"):
        family_row(Normalized())([nn.Parameter(torch.ones(2))], fused=True)
    x = nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    with pytest.raises(ValueError, match="an element depends on a sum over elements"):
        family_row(Wrong())([x], fused=True).step()


# ---- Capturable, and never waiting for the device.


@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_capturable_changes_nothing(row: Row, state_dtype):
    results = []
    for capturable in (False, True):
        model = Net(torch.float64 if state_dtype is None else torch.float32)
        # One by one: noise of stochastic rounding depends on what is put together.
        optimizer = row(model.parameters(), lr=1e-2, capturable=capturable, fused=False, foreach=False)
        train(model, optimizer, 9)
        assert optimizer.skipped_hypergradients == 0
        results.append((list(model.parameters()), optimizer.coefficients(), optimizer.hypergradients()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-13)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-12)
    if row.name != "mada-every-3":  # there it is computed at each step, used or not
        assert (results[0][2] or {}) == pytest.approx(results[1][2] or {}, rel=1e-9)


class NoTransfer(TorchDispatchMode):
    """Fails where memory is copied between devices, which the host would wait for. Reading from "meta" fails anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.copy_.default,
            torch.ops.aten._to_copy.default,
            torch.ops.aten._local_scalar_dense.default,
        ):
            involved = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, Tensor)}
            assert len(involved) == 1, f"{func} between {involved}"
        return out


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, device="meta")], ids=["number", "tensor"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_step_never_waits_for_the_device(row: Row, capturable, compiled, lr, monkeypatch):
    """The device is played by "meta", whose tensors have no values that a program could read."""
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda module, **_: module)
        monkeypatch.setattr(select, "NativeKernels", select.CompiledKernels)
        select._make.cache_clear()
    params = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(40, 300), (5,), (3, 2), ()]]
    optimizer = row(params, lr=1e-2, fused=compiled, capturable=capturable)

    def step():
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()

    step()  # a checkpoint's pretended step is told from a first one by looking at the learning rate
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(4):  # traces, and copies constants once
        step()
    with NoTransfer():
        for _ in range(4):
            step()
    select._make.cache_clear()


# ---- Arguments.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"fused": 1}, TypeError, "fused must be True, False or None, got 1"),
        ({"foreach": "yes"}, TypeError, "foreach must be True, False or None, got 'yes'"),
        ({"fused": True, "foreach": True}, ValueError, "foreach and fused cannot both be True"),
        ({"capturable": None}, TypeError, "capturable must be a bool, got None"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be None, torch.float32 or torch.bfloat16, got"),
        ({"stochastic_rounding": 0}, TypeError, "stochastic_rounding must be a bool, got 0"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        MADA([nn.Parameter(torch.ones(2))], **kwargs)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_foreach_and_one_by_one_agree(row: Row, foreach):
    results = []
    for kwargs in ({"foreach": foreach}, {"fused": False}):
        model = Net()
        optimizer: HypergradientOptimizer = row(model.parameters(), lr=1e-2, **kwargs)
        train(model, optimizer, 8)
        results.append(list(model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_no_warning_where_the_kernels_can_be_built():
    native.why_unavailable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.why_unavailable() is None


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_fast_steps_allocate_nothing_of_the_size_of_a_parameter(row: Row):
    param = nn.Parameter(torch.randn(300, 1000))
    optimizer = row([param], lr=1e-3)
    for _ in range(5):
        param.grad = torch.randn_like(param)
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(3):
            optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events())
    assert 0 < allocated < param.numel() // 10


def test_a_parameter_that_changed_its_shape_is_refused():
    """Its buffers are too short; a kernel that goes by the parameter's size would read and write beyond them."""
    param = nn.Parameter(torch.ones(4))
    optimizer = MADA([param], hyper_warmup=0)
    param.grad = torch.ones(4)
    optimizer.step()
    param.data, param.grad = torch.ones(4000), None
    param.grad = torch.ones(4000)
    with pytest.raises(RuntimeError, match=r"exp_avg has shape \(4,\), its parameter \(4000,\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4000))


def test_buffers_of_mixed_dtypes_are_left_to_the_plain_kernels():
    results = []
    for fused in (None, False):
        param = nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = MADA([param], lr=1e-2, hyper_warmup=0, fused=fused)
        for _ in range(4):
            param.grad = param.detach().clone()
            optimizer.step()
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].double()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_the_compiler_may_be_more_than_one_word(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C {native._compiler()[0]}")
    monkeypatch.setenv("MADA_CACHE_DIR", str(tmp_path / "a folder"))
    native.load.cache_clear()
    try:
        native.load(
            native.Variant(True, False, False, False, False, False, False, "float", "float", "float", "float", False)
        )
    finally:
        native.load.cache_clear()
    assert len(list((tmp_path / "a folder").iterdir())) == 1
