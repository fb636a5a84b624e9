"""Train in processes that are killed at random moments until the run is over.

Every attempt is a fork of this process, which has imported everything: what is tested is what comes after that.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny import tiny_config

from mada_lab.run.config import RunConfig
from mada_lab.run.train import train

STEPS_PER_KILL = 12


def soak_config(kills: int) -> RunConfig:
    """Long enough that the run is not over before the last kill; checkpoints often enough to be killed in one."""
    return tiny_config(steps=STEPS_PER_KILL * kills, checkpoint_every=2, eval_every=50)


def attempt(config: RunConfig, folder: Path) -> tuple[int, int]:
    """A process that goes on with the run, and a pipe in which it writes a byte after every step."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    status = 1
    try:
        os.close(read)
        resume = (folder / "config.json").exists()
        train(config, folder, resume=resume, draw=False, on_step=lambda _: os.write(write, b".") and None)
        status = 0
    finally:
        os._exit(status)


def soak(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    config, killed = soak_config(kills), 0
    with TemporaryDirectory() as other:
        train(tiny_config(steps=2), Path(other) / "run", draw=False)  # imports what is imported when it is needed
    while True:
        process, pipe = attempt(config, folder)
        if killed < kills:
            # One in four before the first step, the others in or after one of the next.
            steps = moments.choice([0, *range(1, 4)])
            for _ in range(steps):
                os.read(pipe, 1)
            time.sleep(moments.uniform(0.0, 0.3 if steps == 0 else 0.02))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(pipe)
        if not os.WIFSIGNALED(status):
            print(f"{killed} kills, then exit code {os.waitstatus_to_exitcode(status)}")
            return
        killed += 1
