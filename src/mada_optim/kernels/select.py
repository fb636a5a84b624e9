"""Which executor carries out the passes of which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from mada_optim.families import Family
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.executor import Executor
from mada_optim.kernels.native.agreement import is_written_out, why_outdated
from mada_optim.kernels.native.executor import NativeExecutor
from mada_optim.kernels.native.library import why_unavailable
from mada_optim.kernels.traced.compiled import CompiledExecutor
from mada_optim.kernels.triton import launch
from mada_optim.kernels.triton.multi_tensor import TritonExecutor


def select_executor(family: Family, group: Mapping[str, Any], device: torch.device) -> Executor:
    """Return the executor for parameters of a group on a device.

    ``fused=False``, ``differentiable``, or a choice of ``foreach``: eager. Otherwise native for the families of MADA
    and OMADA on the CPU; and for elementwise families Triton on CUDA, or compiled where there is no Triton. On the CPU
    they are compiled where ``fused=True`` asks for it, since that takes a while.
    """
    wanted = group["fused"]
    if wanted is False or group["differentiable"] or (wanted is None and group["foreach"] is not None):
        return the(EagerExecutor)
    native = is_written_out(family) and device.type == "cpu" and not group["capturable"]
    compiled = family.elementwise and (bool(wanted) or device.type == "cuda")
    if not (native or compiled) or why_unavailable() is not None:
        return the(EagerExecutor)
    if native and why_outdated(family) is None:
        return the(NativeExecutor)
    if not compiled:
        return the(EagerExecutor)
    return the(TritonExecutor if device.type == "cuda" and launch.is_available() else CompiledExecutor)


# What an executor leaves to another.
_LEFT_TO: dict[Any, type[Executor]] = {TritonExecutor: CompiledExecutor, NativeExecutor: EagerExecutor}


@cache
def the(kind: type[Executor]) -> Executor:
    """Return the one executor of a kind, which keeps what it has compiled."""
    return kind(the(_LEFT_TO[kind])) if kind in _LEFT_TO else kind()  # type: ignore[call-arg]


def check_fused(family: Family) -> None:
    """Raise RuntimeError where ``fused=True`` cannot be had, and say why."""
    if not family.elementwise:
        raise RuntimeError(f"fused=True needs an elementwise family; {family.name} is not")
    problem = why_unavailable()
    if problem is not None:
        needed = "a C++17 compiler (CXX) and a folder for what it compiles (MADA_CACHE_DIR)"
        raise RuntimeError(f"fused=True needs {needed}: {problem}")
