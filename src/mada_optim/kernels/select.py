"""Which kernels work on which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from mada_optim.family import Family, MADAFamily
from mada_optim.kernels.base import Kernels
from mada_optim.kernels.compiled import CompiledKernels
from mada_optim.kernels.native import NativeKernels
from mada_optim.kernels.plain import PlainKernels


def select_kernels(family: Family, group: Mapping[str, Any], device: torch.device) -> Kernels:
    """The kernels for parameters of a group on a device.

    ``fused=False`` or any choice of ``foreach``: plain. Otherwise the fastest that there is: native for MADA's own
    family on the CPU; compiled on CUDA, and on the CPU where ``fused=True`` asks for it, if the family is elementwise.
    """
    wanted = group["fused"]
    if wanted is False or (wanted is None and group["foreach"] is not None):
        return _make(PlainKernels, family)
    if type(family) is MADAFamily and device.type == "cpu" and not group["capturable"]:
        return _make(NativeKernels, family)
    if family.elementwise and (wanted or device.type == "cuda"):
        return _make(CompiledKernels, family)
    return _make(PlainKernels, family)


@lru_cache(maxsize=64)
def _make(kind: type[PlainKernels], family: Family) -> Kernels:
    return kind(family)
