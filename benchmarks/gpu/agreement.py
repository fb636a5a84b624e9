"""Every named optimizer on the GPU agrees with the CPU: fused and plain, in three dtypes, while it learns.

And its steps do not wait for the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import Any

import torch

from gpu.device import Cpu, Setting
from gpu.optimizers import Optimizer, learns, named_optimizers, new_params, train
from gpu.record import Record

# What parameters and coefficients may differ by. The Newton-Schulz iteration is in float32, on a GPU in bfloat16.
ALLOWED = {torch.float64: (1e-10, 1e-9), torch.float32: (2e-5, 1e-3), torch.bfloat16: (4e-2, 5e-2)}
MATRICES = (3e-4, 2e-2)
LEARNED = 1e-4  # that a coefficient moves at least
WORKERS = 8


def run(setting: Setting, record: Record) -> None:
    names = list(named_optimizers())
    if not setting.small:
        compare_in_processes(names, setting, record, min(WORKERS, os.cpu_count() or 1))
        return
    for name in names:
        with record.check(name) as values:
            compare(name, setting, values)


def compare_in_processes(names: Sequence[str], setting: Setting, record: Record, workers: int) -> None:
    """Call :func:`compare` side by side: compiling takes most of the time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compare_alone, name, setting): name for name in names}
        for future in as_completed(futures):
            with record.check(futures[future]) as values:
                try:
                    found, problem = future.result()
                except BrokenProcessPool as error:
                    raise AssertionError("its process died") from error
                values |= found
                assert problem is None, problem


def compare_alone(name: str, setting: Setting) -> tuple[dict[str, Any], str | None]:
    """Call :func:`compare` in a process of its own. Return the values, and what is wrong."""
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    try:
        compare(name, setting, values)
    except Exception as error:
        return values, f"{type(error).__name__}: {error}"
    return values, None


def compare(name: str, setting: Setting, values: dict[str, Any]) -> None:
    """Raise where an optimizer on the device differs from the CPU, does not learn, or waits for the device.

    ``values`` gets the largest differences of parameters and of coefficients.
    """
    make, small = named_optimizers()[name], setting.small
    problems = []
    for dtype, allowed in ALLOWED.items():
        expected, learned = train(make, Cpu(), dtype, small, fused=False)
        _, start = train(make, Cpu(), dtype, small, steps=0)
        short = str(dtype).removeprefix("torch.")
        moved = max(abs(learned[key] - value) for key, value in start.items() if key in learned)
        if learns(make) and moved < LEARNED:
            problems.append(f"{short}: the coefficients moved by {moved:.1e} only")
        if name.startswith("omada"):
            allowed = (max(allowed[0], MATRICES[0]), max(allowed[1], MATRICES[1]))
        for fused in (None, False):
            params, coefficients = train(make, setting.device, dtype, small, fused=fused)
            errors = [
                max(float((one - other).abs().max()) for one, other in zip(params, expected, strict=True)),
                max(abs(coefficients[key] - learned[key]) for key in learned),
            ]
            title = f"{short}, {'plain' if fused is False else 'fused'}"
            values[title] = " ".join(f"{error:.1e}" for error in errors)
            if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
                problems.append(f"{title}: {values[title]}")
    try:
        check_no_waiting(make, setting)
    except Exception as error:
        problems.append(f"it waits: {error}")
    assert not problems, "; ".join(problems)


def check_no_waiting(make: Optimizer, setting: Setting) -> None:
    """Raise, as torch does, where the program waits for the device."""
    params = new_params(setting.device.name, torch.float32, setting.small)
    optimizer = make(params, lr=1e-3)
    for step in range(8):
        for param in params:
            param.grad = torch.randn_like(param)
        with setting.device.no_waiting() if step >= 4 else nullcontext():
            optimizer.step()
