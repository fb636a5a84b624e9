from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from forked import TIMEOUT
from tiny import assert_same_run, tiny_config

from mada_lab.errors import InputError
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.sweep.pool import Pool


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One for all: it takes seconds to start."""
    with Pool(2) as pool:
        assert pool.run(lambda: "", {"first": ()}, lambda *_: None)
        yield


# Functions are made here and thus travel by value: the other processes cannot import test modules.


def make_unreliable() -> Callable[[str, str], str]:
    def function(how: str, path: str) -> str:
        with open(path, "a+") as file:
            file.write("x")
            file.flush()
            file.seek(0)
            count = len(file.read())
        if how == "dies" or (how == "dies once" and count == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise InputError("the disk is full\nsomewhere")
        return "finished"

    return function


@pytest.mark.usefixtures("ray_session")
def test_what_dies_is_tried_again_once_and_the_others_go_on(tmp_path: Path) -> None:
    names = ["dies", "raises", "dies once", "lives"]
    ended: dict[str, str] = {}
    with Pool(2) as pool:
        assert pool.run(make_unreliable(), {name: (name, str(tmp_path / name)) for name in names}, ended.__setitem__)
    assert ended == {
        "dies": "failed: its process died twice",
        "raises": "failed: the disk is full",
        "dies once": "finished",
        "lives": "finished",
    }
    assert {name: (tmp_path / name).read_text() for name in names} == {
        "dies": "xx",
        "raises": "x",
        "dies once": "xx",
        "lives": "x",
    }


def make_killed_once() -> Callable[[str], str]:
    config = tiny_config()

    def function(folder: str) -> str:
        resume = RunFolder(folder).config_file.exists()

        def on_step(report: object) -> None:
            if not resume and report.step == 15:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)

        return train(config, folder, resume=resume, on_step=on_step, draw=False).status

    return function


@pytest.mark.usefixtures("ray_session")
def test_a_run_whose_process_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    ended: dict[str, str] = {}
    with Pool(1) as pool:
        assert pool.run(make_killed_once(), {"run": (str(tmp_path / "killed"),)}, ended.__setitem__)
    assert ended == {"run": "finished"}
    train(tiny_config(), tmp_path / "whole", draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def make_overlap() -> Callable[[str], str]:
    def function(folder: str) -> str:
        import tempfile

        with tempfile.NamedTemporaryFile(dir=folder):
            count = len(os.listdir(folder))
            time.sleep(0.1)
            return str(max(count, len(os.listdir(folder))))

    return function


@pytest.mark.usefixtures("ray_session")
def test_no_more_at_once_than_workers(tmp_path: Path) -> None:
    counts: list[str] = []
    with Pool(1) as pool:
        pool.run(make_overlap(), {str(i): (str(tmp_path),) for i in range(4)}, lambda _, count: counts.append(count))
    assert counts == ["1"] * 4


def test_what_does_not_fit_into_memory_is_told_from_what_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from mada_lab.sweep import pool

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(ray, "get", fail)
    assert "memory" in pool._outcome(ray.exceptions.OutOfMemoryError("killed"))
    assert "died twice" in pool._outcome(ray.exceptions.RayError())


def test_without_ray_calls_are_made_here_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended: dict[str, str] = {}

    def function(how: str) -> str:
        if how == "raises":
            raise RuntimeError("no memory\nleft")
        return how

    with Pool(0) as pool:
        calls = {name: (name,) for name in ("finished", "raises", "diverged", "interrupted", "not begun")}
        assert not pool.run(function, calls, ended.__setitem__)
        assert ended == {"finished": "finished", "raises": "failed: no memory", "diverged": "diverged"}
        assert pool.run(function, {"finished": ("finished",)}, ended.__setitem__)
    with pytest.raises(InputError, match="workers must be a positive integer, got 0"):
        Pool(0, "127.0.0.1:1")


def test_nothing_to_do_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "_start", lambda _: pytest.fail("started"))
    with Pool(1) as pool:
        assert pool.run(make_overlap(), {}, lambda *_: None)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere", "Ray cannot be used at address 'nowhere'"),
        ("127.0.0.1:1", "address must be that of a Ray cluster, got '127.0.0.1:1'"),
    ],
)
def test_a_cluster_that_is_not_there(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match=message), Pool(1, address) as pool:
        pool.run(make_overlap(), {"one": ("",)}, lambda *_: None)


EXPERIMENT = """
[base]
task = { layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }
steps = 100000
eval_every = 100000
checkpoint_every = 100000
threads = 1
[contenders.adamw]
name = "adamw"
[axes]
seed = [0, 1, 2]
"""


def end(process: subprocess.Popen[str]) -> None:
    """End what a test that failed has left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups on this system")
def test_ctrl_c_stops_at_checkpoints_and_leaves_no_process(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "file.toml").write_text(EXPERIMENT)
    out = tmp_path / "out"
    # SIGINT as a shell hands it to what it runs in the foreground.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " + (
        "from mada_lab.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["sweep", str(tmp_path / "file.toml"), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    request.addfinalizer(lambda: end(process))
    runs = [RunFolder(out / "tune" / "runs" / f"adamw-seed{seed}") for seed in (0, 1)]
    deadline = time.monotonic() + TIMEOUT
    while not all(run.metrics() for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, printed
    assert printed == f"Interrupted. The same command with --out {out} goes on.\n"
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert not (out / "tune" / "runs" / "adamw-seed2").exists()
    for run in runs:
        state = run.load_checkpoint()
        assert state is not None
        assert 0 < state["step"] < 100000
        assert len([line for line in run.metrics() if "loss" in line]) == state["step"]
