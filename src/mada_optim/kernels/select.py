"""Which kernels work on which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from mada_optim.families import Family, MADAFamily, OMADAFamily
from mada_optim.kernels.base import Kernels
from mada_optim.kernels.eager import PlainKernels
from mada_optim.kernels.native.agreement import why_outdated
from mada_optim.kernels.native.executor import NativeKernels
from mada_optim.kernels.native.library import why_unavailable
from mada_optim.kernels.traced.compiled import CompiledKernels
from mada_optim.kernels.triton import launch
from mada_optim.kernels.triton.multi_tensor import MultiTensorKernels


def select_kernels(family: Family, group: Mapping[str, Any], device: torch.device) -> Kernels:
    """The kernels for parameters of a group on a device.

    ``fused=False``, ``differentiable``, or a choice of ``foreach``: plain. Otherwise native for the families of MADA
    and OMADA on the CPU; and for elementwise families multi-tensor on CUDA, but compiled in captured graphs, and on the
    CPU where ``fused=True`` asks for it, since compiling takes a while.
    """
    wanted = group["fused"]
    if wanted is False or group["differentiable"] or (wanted is None and group["foreach"] is not None):
        return _make(PlainKernels, family)
    native = type(family) in (MADAFamily, OMADAFamily) and device.type == "cpu" and not group["capturable"]
    compiled = family.elementwise and (bool(wanted) or device.type == "cuda")
    if not (native or compiled) or why_unavailable() is not None:
        return _make(PlainKernels, family)
    if native and why_outdated(family) is None:
        return _make(NativeKernels, family)
    if not compiled:
        return _make(PlainKernels, family)
    # Where tensors lie in memory must not be fixed at a capture's first run.
    at_once = device.type == "cuda" and not group["capturable"] and launch.is_available()
    return _make(MultiTensorKernels if at_once else CompiledKernels, family)


def check_fused(family: Family) -> None:
    """Raise RuntimeError where ``fused=True`` cannot be had, and say why."""
    if not family.elementwise:
        raise RuntimeError(f"fused=True needs an elementwise family; {family.name} is not")
    problem = why_unavailable()
    if problem is not None:
        needed = "a C++17 compiler (CXX) and a folder for what it compiles (MADA_CACHE_DIR)"
        raise RuntimeError(f"fused=True needs {needed}: {problem}")


@lru_cache(maxsize=64)
def _make(kind: type[PlainKernels], family: Family) -> Kernels:
    return kind(family)
