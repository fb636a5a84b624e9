"""A step in a captured graph, beside the same step in eager mode, on GPT-2's tensors.

The kernels are the same. With ``capturable=True`` they read step counts on the device, and a replay copies the tables.
"""

from __future__ import annotations

from functools import partial

import torch

from gpu.device import Setting
from gpu.optimizers import Optimizer
from gpu.record import Record
from gpu.steps import WARM, workload
from gpu.timing import time_step
from mada_lab.bench.contender import LR
from mada_optim import MADA, load_optimizer

EQUAL = 1.05  # the replay by the clock, by the device's time of a step that is not captured


def run(setting: Setting, record: Record) -> None:
    tensors, device = workload("b", setting), setting.device
    paper = load_optimizer("mada-paper")
    makers: dict[str, Optimizer] = {
        "MADA, everything": partial(paper, hyper_warmup=0),
        "MADA, default": partial(MADA, hyper_warmup=0),
        "MADA, nothing learned": partial(MADA, hyper_lr=0.0),
        "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    }
    for name, make in makers.items():
        uncaptured = None
        with record.check(f"{name}, capturable=False") as values:
            optimizer = make(list(tensors.params), lr=LR)
            for _ in range(WARM):
                optimizer.step()
            uncaptured = time_step(optimizer.step, device, **setting.repeats)
            values |= uncaptured.values()
        with record.check(f"{name}, capturable, eager") as values:
            optimizer = make(list(tensors.params), lr=LR, capturable=True)
            for _ in range(WARM):
                optimizer.step()
            values |= time_step(optimizer.step, device, **setting.repeats).values()
        with record.check(f"{name}, replayed") as values:
            replay = device.capture(optimizer.step)
            replay()
            taken = time_step(replay, device, **setting.repeats)
            values |= taken.values()
            if uncaptured is not None and name.startswith("MADA"):
                record.bar(f"{name}, replay by clock, by the device's step", taken.clock / uncaptured.device, EQUAL)
