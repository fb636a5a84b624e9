"""Sources in Triton made into kernels, and launched without losing time."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of all kernels: products and sums round one after the other, as on a CPU. Versions of Triton differ in it."""


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether there is Triton, which comes with torch for GPUs."""
    return find_spec("triton") is not None


class Kernel:
    """A Triton kernel, looked up once where Triton would look it up at each launch, which takes longer than the launch.

    It holds for arguments of the same dtypes that are all aligned to 16 bytes, and for any number.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def launch(
        self,
        device: torch.device,
        programs: int,
        arguments: Sequence[Any],
        constants: Sequence[Any] = (),
        **options: int,
    ) -> None:
        """Run a number of programs on a device. ``constants`` are the last of the kernel's arguments."""
        with _on(device):
            key = (device, *constants, *options.values())
            compiled = self._compiled.get(key)
            if compiled is None:
                self._compiled[key] = self._function[(programs, 1, 1)](*arguments, *constants, **options)
            else:
                compiled[(programs, 1, 1)](*arguments, *constants)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a device is the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=256)
def load(source: str) -> Kernel:
    """The kernel of a source."""
    name = f"<mada_optim kernel {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton reads it there
    namespace: dict[str, Any] = {"__name__": "mada_optim.kernels.triton_kernel"}
    exec(compile(source, name, "exec"), namespace)
    return Kernel(namespace["run"])
