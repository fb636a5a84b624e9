"""Any family on any device, with torch's operators, on pieces of a size that suits the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.families import Family
from mada_optim.kernels.base import Batch, Kernels, coefficients_and_constants
from mada_optim.learning.hypergradient import align_and_advance
from mada_optim.tensors.blocks import DEVICE_ELEMENTS, Block, make_blocks
from mada_optim.tensors.devices import move_numbers, number_dtype, number_on
from mada_optim.tensors.rounding import noise_seed, round_stochastically


class PlainKernels(Kernels):
    """The family's update as it is written, piece by piece.

    Args:
        family: whose update it is.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    def settle(self, batch: Batch, values: Tensor, learned: Sequence[str], keep: bool) -> Tensor | None:  # noqa: ARG002
        """See :meth:`Kernels.settle`."""
        q = self._q(batch, values)
        step = number_on(batch.step, batch.device)
        learned = [name for name in learned if batch.has_grad]
        total: Tensor | None = None
        for number, block in enumerate(self._blocks(batch, self.family.elementwise)):
            state = {name: block.read(name, batch.dtype) for name in self.family.buffers(q)}
            grad = block.read("pending_grad", batch.dtype)
            if learned:
                next_grad = self._grad(batch, block)
                aligned, advanced = align_and_advance(self.family, state, grad, next_grad, q, learned, step)
                total = aligned if total is None else total + aligned
            else:
                _, advanced = self.family.update(state, grad, q, step)
            self._write(batch, block, advanced, noise_seed(batch.step, batch.index, number))
        batch.note_writes(self.family.buffers(q))
        return None if total is None else spread(self.family, learned, move_numbers(total, values.device))

    def step(self, batch: Batch, values: Tensor, keep: bool) -> None:
        """See :meth:`Kernels.step`."""
        q = self._q(batch, values)
        step = number_on(batch.step + 1, batch.device)
        lr, weight_decay = batch.group["lr"], batch.group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # a tensor of one element may have any number of dimensions
            if lr.dtype == torch.float64:
                lr = lr.to(number_dtype(batch.device))
        for number, block in enumerate(self._blocks(batch, self.family.elementwise)):
            grad = self._grad(batch, block)
            state = {name: self._before(batch, block, name) for name in self.family.buffers(q)}
            direction, advanced = self.family.update(state, grad, q, step)
            param = self._before(batch, block, "param") * (1 - lr * weight_decay) - lr * direction
            kept = {"pending_grad": grad} if keep else advanced
            # settle() has used the noise of the last step, perhaps on the same buffers.
            seed = noise_seed(batch.step + 1, batch.index, number)
            self._write(batch, block, {"param": param, **kept}, seed)
        batch.note_writes(["param", *(["pending_grad"] if keep else self.family.buffers(q))])

    @staticmethod
    def _blocks(batch: Batch, elementwise: bool) -> list[Block]:
        size = None if batch.device.type == "cpu" else DEVICE_ELEMENTS
        return list(make_blocks(batch.roles, elementwise, size, gather=batch.group["foreach"] is not False))

    def _q(self, batch: Batch, values: Tensor) -> dict[str, Any]:
        return coefficients_and_constants(self.family, batch.group, move_numbers(values, batch.device))

    @staticmethod
    def _before(batch: Batch, block: Block, name: str) -> Tensor:
        tensor = block.read(name, batch.dtype)
        # Autograd may need again what is about to be overwritten.
        return tensor.clone() if batch.group["differentiable"] else tensor

    @staticmethod
    def _grad(batch: Batch, block: Block) -> Tensor:
        """Gradient of what is minimized."""
        grad = block.read("grad", batch.dtype)
        return -grad if batch.group["maximize"] else grad

    def _write(self, batch: Batch, block: Block, values: Mapping[str, Tensor], seed: int | Tensor) -> None:
        for name, value in to_store(self.family, batch, values, block.members[0], seed).items():
            block.write(name, value)


def to_store(
    family: Family, batch: Batch, values: Mapping[str, Tensor], stored: Mapping[str, Tensor], seed: int | Tensor
) -> dict[str, Tensor]:
    """New values as they are to be stored, in any order: rounded, and not in the memory of what is overwritten.

    Args:
        family: whose update made them.
        batch: to which they belong.
        values: by name.
        stored: tensors that they go to, by name.
        seed: of the noise of stochastic rounding.
    """
    unknown = [name for name in values if name not in stored]
    if unknown:
        raise RuntimeError(f"update of {family.name} returned {unknown[0]!r}, which its buffers() does not name")
    overwritten = {stored[name].untyped_storage()._cdata for name in values}
    found = {}
    for role, (name, value) in enumerate(values.items()):
        if is_rounded_stochastically(batch, name, stored[name].dtype):
            value = round_stochastically(value.float(), seed + role)
        elif value is not stored[name] and value.untyped_storage()._cdata in overwritten:
            # A family may hand a buffer on as another one.
            value = value.clone()
        found[name] = value
    return found


def is_rounded_stochastically(batch: Batch, name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of that name and stored dtype is rounded stochastically.

    Buffers in bfloat16 always: an average that moves by less than half a unit in the last place would stand still.
    """
    return bool(dtype == torch.bfloat16 and (name != "param" or batch.group["stochastic_rounding"]))


def spread(family: Family, learned: Sequence[str], aligned: Tensor) -> Tensor:
    """The derivatives by ``learned``, shape (len(learned),), put into their places among all coefficients."""
    parts = dict(zip(learned, aligned.unbind(), strict=True))
    zero = torch.zeros_like(aligned[0])
    return torch.stack([parts.get(coefficient.name, zero) for coefficient in family.coefficients])
