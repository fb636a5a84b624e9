"""torchrun: several processes, on one host and on two, train as one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import torchrun
from tiny import assert_close_run, assert_same_run, tiny_config

from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train

HERE = Path(__file__).parents[1]
TIMEOUT = 120  # only so that nothing hangs for ever; a busy machine is slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available() and sys.platform == "linux"),
    reason="needs torch.distributed with gloo, on Linux",
)

# The run of tiny.py. One of the processes is told to stop after step 17, where STOP is given. Each says how it ended in
# one write: the processes share a pipe, and print makes several writes where Python does not buffer.
PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tiny import tiny_config
from mada_lab.run.train import train
def on_step(report):
    if report.step == 17 and os.environ["RANK"] == "1" and sys.argv[3:] == ["STOP"]:
        os.kill(os.getpid(), signal.SIGTERM)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if report.step == 17 and first and os.environ["RANK"] == "1" and sys.argv[3:] == ["DIE"]:
        os.kill(os.getpid(), signal.SIGKILL)
result = train(tiny_config(dtype="float64"), sys.argv[1], on_step=on_step, draw=False)
os.write(1, f"{os.environ['RANK']} {result.status} {result.step}\\n".encode())
"""

COMMAND = """
import sys
from mada_lab.cli.main import main
assert main(sys.argv[1:]) == 0
"""

APART = """
import os, sys
sys.path.insert(0, sys.argv[2])
from tiny import tiny_config
from mada_lab.run.train import train
from mada_lab.errors import InputError
try:
    train(tiny_config(dtype="float64"), os.path.join(sys.argv[1], os.environ["RANK"]), resume=True, draw=False)
except InputError as error:
    os.write(1, f"{error}\\n".encode())
"""


def outputs(*commands: tuple[list[str], dict[str, str]]) -> list[str]:
    """What commands that run at the same time print, each in its environment; all must succeed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**os.environ, **env}, **pipes) for command, env in commands]  # type: ignore[call-overload]
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            process.terminate()  # torchrun then ends its processes, too
            process.communicate()
    assert all(process.returncode == 0 for process in started), said
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_config(dtype="float64"), folder, draw=False)
    return folder


def test_two_processes_stop_together_and_go_on(alone: Path, program: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = torchrun(str(program), str(whole), str(HERE))
    assert sorted(said.split("\n")) == ["", "0 finished 30", "1 finished 30"]
    assert_close_run(whole, alone)

    said = torchrun(str(program), str(stopped), str(HERE), "STOP")
    assert sorted(said.split("\n")) == ["", "0 interrupted 17", "1 interrupted 17"]
    assert len([line for line in RunFolder(stopped).metrics() if "loss" in line]) == 17
    assert len(list((stopped / "tensorboard").iterdir())) == 1
    (command := tmp_path / "command.py").write_text(COMMAND)
    said = torchrun(str(command), "train", "--resume", str(stopped))
    assert said.count("Going on from step 17.") == said.count("Validation loss") == 1
    assert_same_run(stopped, whole)


def test_four_processes_that_start_again_go_on_bit_for_bit(program: Path, tmp_path: Path) -> None:
    """One of them dies, and torchrun starts all anew. More than two may add up their gradients in several orders."""
    whole, died = tmp_path / "whole", tmp_path / "died"
    torchrun(str(program), str(whole), str(HERE), processes=4)
    said = torchrun("--max-restarts", "1", str(program), str(died), str(HERE), "DIE", processes=4)
    assert sorted(said.split("\n")) == ["", *(f"{rank} finished 30" for rank in range(4))]
    assert_same_run(died, whole)


def test_processes_that_see_different_folders(tmp_path: Path) -> None:
    """As on hosts that share none, one of which has what another run left."""
    for rank in range(2):
        train(tiny_config(dtype="float64", steps=10 + 10 * rank), tmp_path / f"{rank}", draw=False)
        config = json.loads((tmp_path / f"{rank}" / "config.json").read_text())
        (tmp_path / f"{rank}" / "result.json").unlink()
        config["config"]["steps"] = 30
        (tmp_path / f"{rank}" / "config.json").write_text(json.dumps(config))
        state = torch.load(tmp_path / f"{rank}" / "checkpoint.pt", weights_only=True)
        torch.save({**state, "config": config["config"]}, tmp_path / f"{rank}" / "checkpoint.pt")
    program = tmp_path / "program.py"
    program.write_text(APART)
    assert torchrun(str(program), str(tmp_path), str(HERE)).count("steps 10 to 20; all must see one folder") == 2


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from mada_lab.errors import InputError
    from mada_lab.run.processes import Processes

    batch = (torch.arange(6), torch.arange(6))
    one, other = Processes(1, 3).share(batch, accumulate=2)
    assert [part.tolist() for part in (*one, *other)] == [[2], [2], [3], [3]]
    with pytest.raises(InputError, match="batch must be a multiple of the number of processes, 4, got 6"):
        Processes(0, 4).share(batch)
    with pytest.raises(InputError, match="multiple of the number of processes times accumulate, 12, got 6"):
        Processes(0, 3).share(batch, accumulate=4)


# Two hosts: network namespaces, joined by a cable of their own.


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """For each host: its name, its address, its network device."""
    tag = f"{os.getpid() % 10**5}"
    names, devices, addresses = [f"mada{tag}{i}" for i in "ab"], [f"ve{tag}{i}" for i in "ab"], []
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
            addresses.append(f"10.231.77.{number}")
            ip("link", "set", device, "netns", name)
            ip("-n", name, "address", "add", f"{addresses[-1]}/24", "dev", device)
            for each in (device, "lo"):
                ip("-n", name, "link", "set", each, "up")
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"network namespaces cannot be made here (root?): {error.stderr.strip()}")
    try:
        yield list(zip(names, addresses, devices, strict=True))
    finally:
        remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.skipif(shutil.which("ip") is None, reason="no command ip")
def test_two_hosts(alone: Path, program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hosts() as both:
        commands = []
        for rank, (name, address, device) in enumerate(both):
            where = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--local-addr", address]
            meet = ["--master-addr", both[0][1], "--master-port", "29511"]
            command = ["ip", "netns", "exec", name, *TORCHRUN, *where, *meet, str(program), str(folder), str(HERE)]
            commands.append((command, {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}))
        assert outputs(*commands) == ["0 finished 30\n", "1 finished 30\n"]
    assert_close_run(folder, alone)
