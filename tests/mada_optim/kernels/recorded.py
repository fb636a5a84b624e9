"""What stands for a CUDA graph on the CPU: operations of torch and launches of kernels, recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mada_optim.kernels.triton import columns, launch, multi_tensor
from mada_optim.optimizers import torch_protocols
from mada_optim.tensors import devices


class Graph(TorchDispatchMode):
    """Records a function: nothing is written meanwhile, and what is made holds nothing until it is replayed.

    Args:
        function: to be recorded.
    """

    recording: Graph | None = None

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.made: list[Tensor] = []
        Graph.recording = self
        try:
            with self:
                function()
        finally:
            Graph.recording = None
        for tensor in self.made:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        """Do what was recorded, with the same tensors."""
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            assert args[0].dtype == torch.bool, "the program waits for the device"  # "pending" is on the host
            return call()
        if func._schema.is_mutable:
            self.calls.append(call)
            return args[0] if func._schema.returns else None
        out = call()
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in given]
        if made:
            self.made += made
            self.calls.append(lambda: [to.copy_(new) for to, new in zip(_tensors(out), _tensors(call()), strict=True)])
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stand_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program know of graphs that are recorded, launches be recorded, and copies to the device be copies."""
    launch_now, send = launch.Kernel.launch, devices.send

    def launched(*args: Any, **kwargs: Any) -> None:
        call = partial(launch_now, *args, **kwargs)
        call() if Graph.recording is None else Graph.recording.calls.append(call)

    monkeypatch.setattr(launch.Kernel, "launch", launched)
    for module in (devices, columns, torch_protocols):
        monkeypatch.setattr(module, "is_capturing", lambda _: Graph.recording is not None)
    for module in (devices, columns, multi_tensor):
        monkeypatch.setattr(module, "send", lambda tensor, reader: send(tensor, reader).clone())
