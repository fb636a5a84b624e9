"""Processor time of orthogonalization, and of whole training steps, by one thread; the machine may be busy with more.

Run it as ``python benchmarks/orthogonalization.py ghij 9``: letters of workloads, and rounds.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch

from mada_lab.bench.contenders import contenders
from mada_lab.bench.routines import quintics
from mada_lab.bench.workloads import WORKLOADS
from mada_optim.matrices import directions

torch.set_num_threads(1)
ours, before = directions.newton_schulz, "OMADA before, at the rates found"
choices = {
    "j": ["AdamW, fused", "OMADA, at the rates found", before, "Muon and AdamW (torch)"],
}
routines = ["Muon's iteration, batched", "orthogonalize", "orthogonalize, Muon's iteration"]
routines += ["torch.optim.Muon, one by one", "SVD"]
table = {contender.name: contender for contender in contenders()}
for letter in sys.argv[1]:
    workload = WORKLOADS[letter]("cpu")
    print(f"\n({letter}) {workload.title}\n\n| | processor time, ratio | ms | singular values |\n|---|---|---|---|")
    running: dict[str, Any] = {}
    for name in choices.get(letter, routines):
        running[name] = (WORKLOADS[letter]("cpu") if letter == "j" else workload).start(
            table[name.replace(" before", "")]
        )
    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(int(sys.argv[2]) + 1):
        for name, run in running.items():
            if name == "SVD" and turn > 2:
                continue
            directions.newton_schulz = (lambda batch, *_: quintics(batch)) if name == before else ours
            begin = time.thread_time()
            run.step()
            if turn:  # the first one warms up
                times[name].append(time.thread_time() - begin)
    directions.newton_schulz = ours
    first = next(iter(times.values()))
    for name, run in running.items():
        ratio = median(a / b for a, b in zip(times[name], first, strict=False))
        values = "" if run.singular_values is None else "{:.3f} to {:.3f}".format(*run.singular_values())
        print(f"| {name} | {ratio:.2f} | {1e3 * median(times[name]):.1f} | {values} |", flush=True)
