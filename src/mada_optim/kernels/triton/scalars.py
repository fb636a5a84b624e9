"""Functions of a few numbers on a GPU, as one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mada_optim.kernels.triton.launch import EXACT, Kernel, load
from mada_optim.kernels.triton.source import write_for_numbers

# With the positions of the tensors that each of them writes.
_KERNELS: dict[Hashable, tuple[Kernel, list[int]]] = {}


def change_numbers(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function that changes some of the tensors that it is given by ``copy_``, fused.

    Args:
        function: of ``tensors`` alone.
        tensors: of 0 or 1 dimension, contiguous, all on one device for which there is Triton.
    """
    key = (function, *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key not in _KERNELS:
        traced = make_fx(lambda *given: function(*given), tracing_mode="fake")(*tensors)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        copied_to = {node.args[0] for node in traced.graph.nodes if node.target is torch.ops.aten.copy_.default}
        written = [k for k, node in enumerate(inputs) if node in copied_to]
        _KERNELS[key] = load(write_for_numbers(traced)), written
    kernel, written = _KERNELS[key]
    kernel.launch(tensors[0].device, 1, tensors, num_warps=1, **EXACT)
    torch.autograd.graph.increment_version(tensors[k] for k in written)
