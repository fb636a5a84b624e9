"""Versions, imports, and two steps of each optimizer that is timed: what is broken altogether shows here."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

import mada_optim
from gpu.device import Cuda, Setting
from gpu.optimizers import new_params, timed_contenders
from gpu.record import Record


def run(setting: Setting, record: Record) -> None:
    record.row("versions", **versions(setting))
    for contender in timed_contenders():
        assert contender.make is not None
        with record.check(contender.name) as values:
            params = new_params(setting.device.name, torch.float32, setting.small)
            optimizer = contender.make(params)
            began = time.perf_counter()
            for _ in range(2):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            setting.device.synchronize()
            values["seconds"] = time.perf_counter() - began
            assert all(bool(param.isfinite().all()) for param in params)


def versions(setting: Setting) -> dict[str, Any]:
    """Return what the figures belong to."""
    import triton
    from torch._inductor import config

    return {
        "card": torch.cuda.get_device_name() if isinstance(setting.device, Cuda) else "a rehearsal without one",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "triton": triton.__version__,
        "mada_optim": mada_optim.__version__,
        "cores": os.cpu_count(),
        "Inductor's processes": config.compile_threads,
    }
