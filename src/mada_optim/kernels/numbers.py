"""Functions of a few numbers, as one launch where these are on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mada_optim.kernels.launch import Kernel, is_available, load
from mada_optim.kernels.triton_source import write_for_numbers

_KERNELS: dict[Hashable, Kernel] = {}


def change_numbers(function: Callable[..., None], key: Hashable, *tensors: Tensor) -> None:
    """Call a function that changes some of the tensors that it is given by ``copy_``.

    Args:
        function: of ``tensors``, without any other influence than ``key``.
        key: tells functions apart.
        tensors: of 0 or 1 dimension, all on one device.
    """
    if not _is_fast(tensors):
        function(*tensors)
        return
    key = (key, *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key not in _KERNELS:
        traced = make_fx(lambda *given: function(*given), tracing_mode="fake")(*tensors)
        _KERNELS[key] = load(write_for_numbers(traced))
    _KERNELS[key].launch(tensors[0].device, 1, tensors, num_warps=1)


def _is_fast(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].device.type == "cuda" and is_available() and all(map(Tensor.is_contiguous, tensors))
