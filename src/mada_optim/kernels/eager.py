"""Passes with torch's operators, for any family on any device, on pieces of a size that suits the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor, to_store
from mada_optim.kernels.passes import Numbers, Pass
from mada_optim.tensors.blocks import DEVICE_ELEMENTS, Block, make_blocks
from mada_optim.tensors.devices import move_numbers, number_dtype, number_on
from mada_optim.tensors.rounding import noise_place, noise_seed


class EagerExecutor(Executor):
    """A pass as it is written, piece by piece."""

    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """See :meth:`Executor.run`."""
        step = batch.step + 1 if task.later else batch.step
        numbers = _numbers(batch, values, step)
        total: Tensor | None = None
        for number, block in enumerate(_blocks(batch)):
            tensors = {role: _read(task, batch, block, role) for role in task.reads}
            derivatives, new = task(tensors, numbers)
            if derivatives is not None:
                total = derivatives if total is None else total + derivatives
            # The two passes of a step may write the same buffers: each has the noise of its own step.
            seed = noise_seed(noise_place(batch.index, number), step)
            for role, value in to_store(batch, new, block.members[0], seed).items():
                block.write(role, value)
        batch.note_writes(task.writes)
        return None if total is None else task.among_all(move_numbers(total, values.device))


def _numbers(batch: Batch, values: Tensor, step: float | Tensor) -> Numbers:
    lr = batch.group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # a tensor of one element may have any number of dimensions
        if lr.dtype == torch.float64:
            lr = lr.to(number_dtype(batch.device))
    here = move_numbers(values, batch.device)
    return Numbers(here, number_on(step, batch.device), lr, batch.group["weight_decay"])


def _blocks(batch: Batch) -> list[Block]:
    size = None if batch.device.type == "cpu" else DEVICE_ELEMENTS
    elementwise, gather = batch.update.family.elementwise, batch.group["foreach"] is not False
    return list(make_blocks(batch.roles, elementwise, size, gather=gather))


def _read(task: Pass, batch: Batch, block: Block, role: str) -> Tensor:
    tensor = block.read(role, batch.dtype)
    # Autograd may need again what is about to be overwritten.
    return tensor.clone() if batch.group["differentiable"] and role in task.writes else tensor
