"""Native and plain kernels do the same, for every optimizer, dtype and layout, and say so when they cannot be built."""

from __future__ import annotations

import warnings

import forked
import pytest
import torch
from cases import FLOAT32, assert_same, run
from problems import IDS, TABLE, Net, Row, train
from torch import nn

from mada_optim import MADA, HypergradientOptimizer
from mada_optim.cpp import build
from mada_optim.kernels.native import executor as native
from mada_optim.kernels.native import library


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
                assert value.dtype == torch.float32
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
    library.load.cache_clear()
    builds = []
    build_library = build._build
    monkeypatch.setattr(build, "_build", lambda *args: builds.append(args) or build_library(*args))
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
        library.load.cache_clear()
        MADA(params, hyper_lr=0.0).step()
        assert len(builds) == 1, "a second process finds the library in the cache"
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".so"], "nothing else is left behind"
    finally:
        library.load.cache_clear()


def train_without_kernels() -> None:
    """Twice as by default, once with the plain kernels, and in vain with ``fused=True``; says what happens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kwargs in ({}, {}, {"fused": False}):
            x = nn.Parameter(torch.ones(5))
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


def test_without_a_compiler_there_is_one_warning_and_the_plain_kernels(tmp_path):
    done = forked.run(train_without_kernels, CXX="no-such-compiler", MADA_CACHE_DIR=str(tmp_path))
    first, second, plain, warning, refused = done.stdout.strip().splitlines()
    assert first == second == plain
    assert warning.startswith("1 MADA's fused kernels cannot be built")
    assert "no-such-compiler" in warning
    assert refused.startswith("fused=True needs a C++17 compiler (CXX) and a folder")
    assert "no C++ compiler found" in refused


def test_a_compiler_that_fails_is_no_compiler(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho in main: >&2\necho internal error >&2\necho ' 3 | x' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = forked.run(train_without_kernels, CXX=str(broken), MADA_CACHE_DIR=str(tmp_path / "cache"))
    assert f"are slower: {broken}: internal error. Install a C++17 compiler" in done.stdout  # its last line alone


def test_a_cache_that_cannot_be_written_is_no_missing_compiler(tmp_path):
    (tmp_path / "file").touch()
    done = forked.run(train_without_kernels, MADA_CACHE_DIR=str(tmp_path / "file" / "cache"), TMPDIR=str(tmp_path))
    warning = done.stdout.splitlines()[3]
    assert warning.startswith(f"1 MADA's compiled kernels are kept in {tmp_path}/mada-optim-")
    assert "compiler" not in warning
    assert "MADA_CACHE_DIR" in warning


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
    library.why_unavailable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.why_unavailable() is None


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


@pytest.mark.parametrize("others_too", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_a_state_that_lost_a_buffer_is_an_error_and_no_crash(fused: bool | None, others_too: bool):
    gone, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = MADA([gone, other], hyper_warmup=0, fused=fused)
    for _ in range(3):
        gone.grad, other.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
    for param in (gone, other) if others_too else (gone,):
        del optimizer.state[param]["exp_avg"]
        param.grad = None  # its last step is still to be completed
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.step()


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


def test_a_compiler_that_does_not_know_a_type(tmp_path, monkeypatch):
    """Its parameters are left to the plain kernels, the others are not."""
    compiler = tmp_path / "compiler"
    real = " ".join(build._compiler())
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *PARAM=_Float16*) echo what type >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    results = []
    for broken in (True, False):
        params = [nn.Parameter(torch.linspace(-1, 1, 50).to(dtype)) for dtype in (torch.float16, torch.float32)]
        optimizer = MADA(params, lr=1e-2, hyper_warmup=0, fused=None if broken else False)
        if broken:
            monkeypatch.setenv("CXX", str(compiler))
            monkeypatch.setenv("MADA_CACHE_DIR", str(tmp_path / "cache"))
            library.load.cache_clear()
            library.why_unavailable.cache_clear()
        try:
            for step in range(3):
                for param in params:
                    param.grad = param.detach().clone()
                if broken and step == 0:
                    with pytest.warns(UserWarning, match="fused kernels cannot be built, .*: .*what type"):
                        optimizer.step()
                else:
                    optimizer.step()
            if broken:
                assert len(list((tmp_path / "cache").iterdir())) >= 1
        finally:
            if broken:
                library.load.cache_clear()
                library.why_unavailable.cache_clear()
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)


def test_the_compiler_may_be_more_than_one_word(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C {build._compiler()[0]}")
    monkeypatch.setenv("MADA_CACHE_DIR", str(tmp_path / "a folder"))
    library.load.cache_clear()
    try:
        library.load(
            library.Variant(True, False, False, False, False, False, False, "float", "float", "float", "float", False)
        )
    finally:
        library.load.cache_clear()
    assert len(list((tmp_path / "a folder").iterdir())) == 1
