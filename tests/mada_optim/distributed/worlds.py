"""Several processes on this machine that run checks together, started once for all checks of a test module.

A check is a function that every process calls; it fails where any of them raises.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import forked
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)  # only so that nothing hangs for ever; a busy machine is slow


@dataclass(frozen=True)
class World:
    """What a check is given: this process's rank, the number of processes, and a folder that all of them see."""

    rank: int
    size: int
    folder: Path


Check = Callable[[World], None]


def run_world(size: int, checks: Sequence[Check], folder: Path) -> dict[str, str]:
    """Run checks, in order, in ``size`` new processes.

    Returns:
        For each check "" or what went wrong: tracebacks by rank.
    """
    store = folder / f"store{size}-{os.urandom(4).hex()}"
    forked.context()
    arguments = (size, list(checks), folder, store)
    processes = torch.multiprocessing.start_processes(_process, arguments, size, False, start_method=forked.METHOD)
    while not processes.join():
        pass
    reports = [json.loads(Path(f"{store}-{rank}.json").read_text()) for rank in range(size)]
    found = {}
    for check in checks:
        name = check.__name__
        problems = {rank: report.get(name, "not reached, after another failed") for rank, report in enumerate(reports)}
        found[name] = "\n".join(f"rank {rank}: {problem}" for rank, problem in problems.items() if problem)
    return found


def _process(rank: int, size: int, checks: list[Check], folder: Path, store: Path) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    report: dict[str, str] = {}
    for check in checks:
        try:
            check(World(rank, size, folder))
            report[check.__name__] = ""
        except BaseException:
            report[check.__name__] = traceback.format_exc()
            break
    Path(f"{store}-{rank}.json").write_text(json.dumps(report))
    if all(not problem for problem in report.values()):
        dist.destroy_process_group()
