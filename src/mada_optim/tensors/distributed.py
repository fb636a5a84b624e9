"""Parameters that are spread over processes (DTensor: FSDP2, tensor parallelism).

Kernels never see a DTensor: they work on the part of each tensor that is on this process. What depends on all
elements, the hypergradient, is summed over the processes, in one small all-reduce for all parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

# Elements [start, stop) of one dimension; several stand in the order in which they lie in memory.
Ranges = tuple[tuple[int, int], ...]

PLAIN = {Tensor, torch.nn.Parameter}  # what most are; asking further takes time


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. Does not import torch.distributed.tensor: without it, there is none."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this process; it shares its memory."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor.to_local()
    # A communication may still be under way, of which kernels that work on the memory would not know.
    wait = getattr(part, "wait", None)
    return part if wait is None else wait()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the processes over which it is spread."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has all of, spread as ``like`` is: each keeps its part, and nothing is sent."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def replicate_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of any shape that every process has all of, as a DTensor on the mesh of ``like`` where that is one."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


@dataclass(frozen=True, eq=False)
class Spread:
    """Which elements of a tensor each rank holds. Ranks are numbered as in :class:`Team`.

    Args:
        shape: shape of the whole tensor.
        held: for each rank, the ranges of each dimension of the tensor.
        copies: for each rank, which copy of the tensor its elements belong to.
    """

    shape: torch.Size
    held: tuple[tuple[Ranges, ...], ...]
    copies: tuple[tuple[int, ...], ...]


def spread_of(tensor: DTensor) -> Spread | None:
    """How a tensor is spread over the ranks of its mesh.

    None for partial sums, for placements of other libraries, and for strided shards (FSDP2 over tensor parallelism)
    where tensor parallelism cuts unevenly.
    """
    return _spread(tensor.shape, tensor.device_mesh, tensor.placements)


@lru_cache(maxsize=1024)
def _spread(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Spread | None:
    held, copies = [], []
    for rank in _ranks(mesh):
        coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
        ranges: list[Ranges] = [((0, size),) for size in shape]
        for index, count, place in zip(coordinate, mesh.shape, placements, strict=True):
            if place.is_replicate():
                continue
            cut = _cut(place)
            if cut is None or _length(ranges[cut[0]]) % cut[1]:
                return None
            dim, stride = cut
            pieces = [_chunk(ranges[dim], stride, piece) for piece in range(stride)]
            ranges[dim] = tuple(span for piece in pieces for span in _chunk(piece, count, index))
        held.append(tuple(ranges))
        copies.append(tuple(index for index, place in zip(coordinate, placements, strict=True) if place.is_replicate()))
    return Spread(shape, tuple(held), tuple(copies))


def _cut(place: Placement) -> tuple[int, int] | None:
    """Which dimension a placement cuts, and into how many pieces, each of which is cut; None if the type is unknown."""
    from torch.distributed.tensor import Shard

    known = type(place) is Shard or type(place).__name__ == "_StridedShard"
    return (getattr(place, "dim", 0), getattr(place, "split_factor", 1)) if known else None


def _chunk(ranges: Ranges, count: int, index: int) -> Ranges:
    """One of ``count`` chunks, of the sizes that torch.chunk gives them.

    >>> _chunk(((0, 3), (8, 12)), 2, 0)
    ((0, 3), (8, 9))
    """
    size = -(-_length(ranges) // count)
    before, chunk = 0, []
    for start, stop in ranges:
        first = start + max(index * size - before, 0)
        last = start + min((index + 1) * size - before, stop - start)
        before += stop - start
        if first < last:
            chunk.append((first, last))
    return tuple(chunk)


def _length(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def tell_autograd(tensors: Iterable[Tensor]) -> None:
    """Raise the versions of tensors whose local parts were written, which autograd takes for other tensors."""
    torch.autograd.graph.increment_version(tensor for tensor in tensors if is_dtensor(tensor))


def parts(param: Tensor) -> int:
    """Return into how many parts a parameter is cut. There may be several copies of each."""
    if not is_dtensor(param):
        return 1
    mesh = param.device_mesh
    # Not is_shard(), which does not count the strided shards of two-dimensional meshes.
    return math.prod(mesh.size(dim) for dim, place in enumerate(param.placements) if not place.is_replicate())


def spread_like(param: Tensor) -> object:
    """What two parameters have in common whose parts lie alike: copies of both are then on the same processes."""
    return (param.device_mesh, param.placements) if is_dtensor(param) else None


def check_placements(param: Tensor, elementwise: bool) -> None:
    """Raise TypeError where a parameter is spread in a way in which it cannot be updated."""
    if not elementwise and _is_flattened(param):
        raise TypeError(
            "params: this family is not elementwise and needs whole tensors, got a part of FSDP1's flat parameter; "
            "use FSDP2 (fully_shard) and replicate these parameters, or DistributedDataParallel"
        )
    if not is_dtensor(param):
        return
    if any(place.is_partial() for place in param.placements):
        raise TypeError(f"params: a parameter cannot be a partial sum, got a DTensor placed {param.placements}")
    if not elementwise and parts(param) > 1:
        raise TypeError(
            "params: this family is not elementwise and needs whole tensors, "
            f"got a DTensor that is cut up: {param.placements}"
        )


def check_learnable(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where each process would learn from its own part of the parameters alone.

    FSDP1 cuts the parameters up, and ZeroRedundancyOptimizer deals them out. Both hand over plain tensors, whose
    hypergradient is not summed over the processes: the coefficients would drift apart.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    problem = ""
    if _is_within_zero():
        problem = "ZeroRedundancyOptimizer gives each process some of the parameters"
    elif any(map(_is_flattened, params)):
        problem = "FSDP1 (FullyShardedDataParallel) gives each process a part of the parameters"
    if problem:
        raise RuntimeError(
            f"params: {problem} as plain tensors, so each would learn other coefficients (hyper_lr) or another scale; "
            "use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel, or learn nothing: "
            "hyper_lr=0.0, scale=False"
        )


def _is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 made a parameter a part of a flat one, or it is that."""
    return bool(getattr(param, "_fsdp_flattened", False))


def _is_within_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is calling, which has an optimizer for some of the parameters.

    Nothing else tells: the parameters are whole and plain, and each process may have as many of them.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe()
    while frame is not None and frame.f_globals is not vars(module):
        frame = frame.f_back
    return frame is not None


def place_gradient(param: Tensor) -> None:
    """Give a DTensor's gradient the placements of its parameter. Tensor parallelism leaves partial sums in some.

    Raises:
        RuntimeError: the gradient is not on the parameter's mesh.
    """
    grad = param.grad
    if grad is None or not (is_dtensor(param) or is_dtensor(grad)):
        return
    if not (is_dtensor(param) and is_dtensor(grad) and grad.device_mesh == param.device_mesh):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} and its gradient are not spread over the same processes: "
            f"{_describe(param)} and {_describe(grad)}"
        )
    if grad.placements != param.placements:
        param.grad = grad.redistribute(placements=param.placements)


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the same shape into ``target``, however each of them is spread."""
    if is_dtensor(target):
        if is_dtensor(source) and source.device_mesh == target.device_mesh:
            source = source.redistribute(placements=target.placements)
        else:
            source = scatter_like(whole(source).to(target.device), target)
    else:
        source = whole(source)
    local(target).copy_(local(source))
    tell_autograd([target])


@dataclass(frozen=True)
class Team:
    """The processes over which parameters are spread, numbered in ascending order, as torch numbers those of a group.

    All of them get the same bits from :meth:`sum`, for it is one reduction over all: had copies of a parameter been
    left out, each group of shards would add up on its own, and two groups may do so in a different order.

    Args:
        group: the processes.
        size: how many they are.
        device: on which they communicate.
    """

    group: ProcessGroup
    size: int
    device: torch.device

    def share(self, param: Tensor) -> float:
        """Return the factor of this process's part of a sum over all elements of ``param``, before :meth:`sum`."""
        return parts(param) / self.size

    @property
    def rank(self) -> int:
        """Number of this process."""
        return torch.distributed.get_rank(self.group)

    def exchange(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Sequence[Tensor]:
        """Send each process a part of a flat tensor, and return what each of them has sent to this one.

        Args:
            sent: on the team's device.
            sent_counts: how many elements each process gets.
            received_counts: how many elements come from each process.
        """
        received = sent.new_empty(sum(received_counts))
        torch.distributed.all_to_all_single(received, sent, received_counts, sent_counts, group=self.group)
        return torch.split(received, received_counts)

    def gather(self, sent: Tensor) -> Sequence[Tensor]:
        """Return the flat tensors of all processes, which have the same number of elements."""
        gathered = sent.new_empty(self.size * sent.numel())
        # torch 2.13 has a new name for it, and warns of the old one.
        gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        gather(gathered, sent, group=self.group)
        return gathered.chunk(self.size)

    def agrees(self, number: int) -> bool:
        """Whether all processes have the same number."""
        extremes = torch.tensor([number, -number], device=self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=self.group)
        return extremes.tolist() == [number, -number]

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the processes. A NaN or infinity on one of them reaches all."""
        total = numbers.to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return total.to(numbers.device)


def find_team(params: Iterable[Tensor]) -> Team | None:
    """The processes over which any of the parameters are spread; None where all of them are plain tensors.

    Raises:
        RuntimeError: parameters are spread over different processes, or not over this one.
    """
    meshes = _meshes(params)
    if not meshes:
        return None
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = _ranks(largest)
    if any(not set(_ranks(mesh)) <= set(ranks) for mesh in meshes if mesh is not largest):
        raise RuntimeError(
            f"parameters that share a set of coefficients are spread over different processes: {meshes}; "
            "one of the meshes must have all of them"
        )
    if torch.distributed.get_rank() not in ranks:
        raise RuntimeError(f"this process has no part of parameters that are spread over {largest}")
    return team_of(largest)


def team_of_all(device: torch.device) -> Team | None:
    """All processes, which communicate on a device; None where there is only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    world, size = torch.distributed.group.WORLD, torch.distributed.get_world_size()
    return None if world is None or size == 1 else Team(world, size, device)


def any_process(params: Iterable[Tensor], is_true: bool) -> bool:
    """Whether ``is_true`` holds on any of the processes over which parameters are spread, on whatever meshes.

    One mesh after the other: where they are the rows and columns of a grid, that reaches all of it.
    """
    for mesh in _meshes(params):
        if torch.distributed.get_rank() in _ranks(mesh):
            is_true = bool(team_of(mesh).sum(torch.tensor(float(is_true), device="cpu")))
    return is_true


def _meshes(params: Iterable[Tensor]) -> list[DeviceMesh]:
    """Return the meshes of DTensors in their order, which is the same on every process."""
    special = [param for param in params if type(param) not in PLAIN]
    return list(dict.fromkeys(param.device_mesh for param in special if is_dtensor(param)))


def team_of(mesh: DeviceMesh) -> Team:
    """The processes of a mesh."""
    ranks = _ranks(mesh)
    return Team(_group(mesh, ranks), len(ranks), torch.device(mesh.device_type))


def _ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _group(mesh: DeviceMesh, ranks: tuple[int, ...]) -> ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    world = torch.distributed.group.WORLD
    assert world is not None
    return world if len(ranks) == torch.distributed.get_world_size() else _new_group(world, ranks)


@lru_cache(maxsize=16)
def _new_group(world: ProcessGroup, ranks: tuple[int, ...]) -> ProcessGroup:  # noqa: ARG001 (a new world, a new group)
    group: ProcessGroup = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    return group


def _describe(tensor: Tensor) -> str:
    return f"a DTensor on {tensor.device_mesh}" if is_dtensor(tensor) else "a plain tensor"
