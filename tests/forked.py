"""New processes that have imported what is slow to import: a server imports it once, does nothing else, and is forked.

Such a process is as new as one that a shell starts. It saves the seconds in which it would import torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

METHOD = "spawn" if sys.platform == "win32" else "forkserver"
TIMEOUT = 240  # only so that nothing hangs for ever; a busy machine is slow
SLOW = [
    *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.distributed.tensor.parallel"),
    *("torch.distributed.run", "torch.utils.tensorboard", "transformers.models.gpt2.modeling_gpt2"),
    *("mada_lab.run.train", "pytest"),
]


def context() -> Any:
    """Return what makes these processes, as :mod:`multiprocessing` does."""
    chosen = multiprocessing.get_context(METHOD)
    chosen.set_forkserver_preload(SLOW)  # always the same list, for there is one server
    return chosen


def run(
    function: Callable[..., Any], *arguments: Any, timeout: float | None = TIMEOUT, **environment: str
) -> CompletedProcess[str]:
    """Call a function of a module in a new process, and wait for its end.

    Args:
        timeout: seconds after which the process is ended.
        environment: variables in addition to those of this process.

    Returns:
        As :func:`subprocess.run`: the process's exit status (negative: the signal that killed it) and what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = context().Process(target=_call, args=(files, {**os.environ, **environment}, function, arguments))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.terminate()
            process.join()
        return CompletedProcess([function.__name__], process.exitcode, *(file.read_text() for file in files))


def torchrun(*arguments: str, processes: int = 2) -> str:
    """Return what a program prints that torchrun starts. torchrun forks its processes as well."""
    from torch.distributed.run import main

    options = ["--standalone", "--nproc-per-node", f"{processes}", "--run-path", "--start-method", "fork"]
    on_linux = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = run(main, [*options, *arguments], OMP_NUM_THREADS="1", **on_linux)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _call(files: list[Path], environment: dict[str, str], function: Callable[..., Any], arguments: Any) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()  # the server's
    os.environ.update(environment)
    tempfile.tempdir = None  # whoever asked for it in the server kept the answer
    function(*arguments)
