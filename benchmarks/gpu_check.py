"""All checks and timings that need a GPU, in one call: ``python benchmarks/gpu_check.py OUT [--stages NAME ...]``.

The stages run one after the other, each in a process of its own that ends at its limit. Rows are printed as they come
and appended to ``OUT/results.jsonl``. ``OUT/summary.md`` is made of them after each stage. ``OUT/output.txt`` has all
that was printed. So nothing is lost of a call that is cut off. The exit code is 1 where a check does not hold or a
stage did not end. The summary has the bars, met or missed.

Let nothing else use the GPU and the cores meanwhile. ``--rehearse`` runs everything on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from gpu.record import Record, failures, read, write_summary
from gpu.stages import STAGES, run_stage

SECONDS = 535.0  # under nine minutes
REHEARSAL = 600.0  # for a stage: a rehearsal is not timed


def run_all(names: list[str], out: Path, seconds: float, rehearse: bool) -> int:
    """Run stages. Return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for stage in STAGES:
        left = REHEARSAL if rehearse else seconds - (time.perf_counter() - began)
        if stage.name not in names:
            continue
        if left < 5:
            Record(out, stage.name).row("the stage", ended="not begun: the time was over")
            continue
        command = [sys.executable, __file__, str(out), "--only", stage.name, *(["--rehearse"] if rehearse else [])]
        run_stage(stage, command, out, left if rehearse else min(stage.limit, left))
        write_summary(out)
    failed = failures(write_summary(out))
    missed = [f"{row['what']} {row['value']:.3g} (bar {row['bar']:g})" for row in read(out) if row.get("met") is False]
    print(f"\n{time.perf_counter() - began:.0f} s. Failed: {'; '.join(failed) or 'nothing'}", flush=True)
    print(f"Bars missed: {'; '.join(missed) or 'none'}\nWritten: {out}/summary.md", flush=True)
    return 1 if failed else 0


def run_here(name: str, out: Path, rehearse: bool) -> int:
    """Run one stage in this process."""
    import torch
    from gpu.device import Cpu, Cuda, Setting

    if not (rehearse or torch.cuda.is_available()):
        print("There is no GPU here. With --rehearse, everything runs on the CPU.")
        return 2
    module, _, function = next(stage.function for stage in STAGES if stage.name == name).partition(":")
    setting = Setting(Cpu(), small=True) if rehearse else Setting(Cuda())
    getattr(importlib.import_module(module), function)(setting, Record(out, name))
    return 0


def main(argv: list[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description="All checks and timings that need a GPU.")
    parser.add_argument("out", type=Path, help="folder of the results: three files")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--only", choices=names, help=argparse.SUPPRESS)  # in this process
    arguments = parser.parse_args(argv)
    if arguments.only is not None:
        return run_here(arguments.only, arguments.out, arguments.rehearse)
    return run_all(arguments.stages, arguments.out, arguments.seconds, arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
