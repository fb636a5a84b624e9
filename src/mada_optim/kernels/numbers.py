"""Functions of a few numbers on a GPU, as one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mada_optim.kernels.launch import Kernel, load
from mada_optim.kernels.triton_source import write_for_numbers

_KERNELS: dict[Hashable, Kernel] = {}


def change_numbers(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function that changes some of the tensors that it is given by ``copy_``, fused.

    Args:
        function: of ``tensors`` alone.
        tensors: of 0 or 1 dimension, contiguous, all on one device for which there is Triton.
    """
    key = (function, *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key not in _KERNELS:
        traced = make_fx(lambda *given: function(*given), tracing_mode="fake")(*tensors)
        _KERNELS[key] = load(write_for_numbers(traced))
    _KERNELS[key].launch(tensors[0].device, 1, tensors, num_warps=1)
