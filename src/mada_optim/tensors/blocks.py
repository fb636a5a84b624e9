"""Work in pieces of a good size: large tensors are cut, small ones are put end to end.

Eager arithmetic pays for each operation on each tensor, and for every temporary that does not fit the cache. An
elementwise update may be computed on any pieces, so it is computed on pieces for which both costs are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17  # what fits the cache
DEVICE_ELEMENTS = 1 << 24  # where launches cost more than memory

Roles = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """Tensors that are updated together, by role (parameter, gradient, buffers); one mapping for each member.

    All tensors of one member have the same shape. A block of several members is read flattened, end to end.
    """

    members: Sequence[Roles]

    def read(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of one role, converted to ``dtype``. Of a single member it may be the stored one."""
        if len(self.members) == 1:
            tensor = self.members[0][role]
        else:
            tensor = torch.cat([member[role].reshape(-1) for member in self.members])
        return tensor if dtype is None else tensor.to(dtype)

    def flat(self, role: str) -> tuple[Tensor, bool]:
        """The tensor of one role as it is stored, in one dimension, and whether it shares the stored memory.

        A single parameter that is dense in memory is read in the order of its memory, and so are its other tensors.
        """
        if len(self.members) > 1:
            return torch.cat([member[role].reshape(-1) for member in self.members]), False
        permuted = self._in_memory_order(role)
        return permuted.reshape(-1), permuted.is_contiguous()

    def write_flat(self, role: str, value: Tensor) -> None:
        """Store what corresponds to ``flat(role)``."""
        if len(self.members) > 1:
            self.write(role, value)
        else:
            permuted = self._in_memory_order(role)
            permuted.copy_(value.view(permuted.shape))

    def _in_memory_order(self, role: str) -> Tensor:
        param = next(iter(self.members[0].values()))
        return self.members[0][role].permute(sorted(range(param.dim()), key=param.stride, reverse=True))

    def write(self, role: str, value: Tensor) -> None:
        """Store what corresponds to ``read(role)``, converted to the stored dtype."""
        if len(self.members) == 1:
            self.members[0][role].copy_(value)
            return
        stored = [member[role] for member in self.members]
        flat = torch.split(value, [tensor.numel() for tensor in stored])
        pieces = [piece.view(tensor.shape) for tensor, piece in zip(stored, flat, strict=True)]
        if torch.is_grad_enabled():  # the call for all at once has no derivative
            for tensor, piece in zip(stored, pieces, strict=True):
                tensor.copy_(piece)
        else:
            torch._foreach_copy_(stored, pieces)


def make_blocks(
    tensors: Sequence[Roles], elementwise: bool, size: int | None = None, gather: bool = True, cut: bool = True
) -> Iterator[Block]:
    """Arrange tensors into blocks of about ``size`` elements.

    Args:
        tensors: one mapping from role to tensor for each parameter, all of the same roles, dtypes and device.
        elementwise: False: every parameter is a block of its own, whole.
        size: number of elements. Default: ``BLOCK_ELEMENTS``.
        gather: whether small tensors are put together.
        cut: whether large tensors are cut.
    """
    size = BLOCK_ELEMENTS if size is None else size
    gathered: list[Roles] = []
    elements = 0
    for roles in tensors:
        example = next(iter(roles.values()))
        if example.numel() == 0:
            continue
        large = example.numel() > size
        if elementwise and large and cut:
            yield from (Block([piece]) for piece in pieces(roles, size))
        elif large or not (elementwise and gather):
            yield Block([roles])
        else:
            if elements + example.numel() > size:
                yield Block(gathered)
                gathered, elements = [], 0
            gathered.append(roles)
            elements += example.numel()
    if gathered:
        yield Block(gathered)


def pieces(roles: Roles, size: int) -> Iterator[Roles]:
    """Pieces of about ``size`` elements of a parameter's tensors."""
    example = next(iter(roles.values()))
    # Along the longest dimension, so that any layout is cut without a copy.
    dim = max(range(example.dim()), key=example.size)
    length = max(1, size * example.size(dim) // example.numel())
    for start in range(0, example.size(dim), length):
        yield {
            role: tensor.narrow(dim, start, min(length, example.size(dim) - start)) for role, tensor in roles.items()
        }
