"""The orthogonalization of matrices that are spread over ranks: each is gathered by one rank, which does it for all.

A matrix goes to its rank in one all-to-all, its direction goes back in a second one, both in batches of bounded size.
Matrices that a rank holds as a whole (experts, copies) stay where they are.

All ranks of a mesh call the same collectives in the same order. The order follows from what all of them know: the
tensors, in their order, and how they are spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mada_optim.matrices.directions import orthogonalize
from mada_optim.matrices.division import (
    Message,
    box_size,
    copied,
    plan,
    shape_of,
    stays_at_home,
    task_layout,
)
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.newton_schulz import working_dtype
from mada_optim.tensors.distributed import (
    Ranges,
    Spread,
    Team,
    is_dtensor,
    local,
    scatter_like,
    spread_like,
    spread_of,
    team_of,
    team_of_all,
    whole,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What a rank may gather, send or receive in one batch, unless a single matrix is larger. With 64 ranks a message then
# has 1 MiB, enough to use a link fully, and the buffers are small beside a model that needs 64 ranks.
BATCH_BYTES = 64 * 2**20

# :func:`orthogonalize` of tensors in a layout, with the options that it was given.
_Orthogonalize = Callable[[Sequence[Tensor], Layout], list[Tensor]]
_Work = Callable[[list[Any], Layout, _Orthogonalize], Sequence[Tensor]]


def orthogonalize_shared(
    tensors: Sequence[Tensor], layout: Layout, distribute: bool = False, **options: Any
) -> list[Tensor]:
    """Orthogonalize as :func:`orthogonalize` does, and DTensors, whose ranks divide the work.

    Each matrix is orthogonalized by one rank, such that all ranks of a mesh have about the same to compute. A rank that
    holds whole matrices, of its experts or of copies, orthogonalizes those and sends nothing.

    Args:
        tensors: plain tensors and DTensors, the same on all ranks of each mesh.
        layout: how matrices lie in each of the tensors.
        distribute: whether all ranks have the same plain tensors, so that they may divide these, too.
        options: of :func:`orthogonalize`.

    Returns:
        Tensors of the same shapes, dtypes and placements.

    Raises:
        RuntimeError: ``distribute`` is true, and the ranks have different tensors.
    """
    indices_by_work: dict[tuple[Any, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices_by_work.setdefault(_work_for(tensor, layout, distribute), []).append(index)
    directions = list(tensors)
    each = partial(orthogonalize, **options)
    for (work, *_), indices in indices_by_work.items():
        for index, direction in zip(indices, work([tensors[index] for index in indices], layout, each), strict=True):
            directions[index] = direction
    return directions


def _work_for(tensor: Tensor, layout: Layout, distribute: bool) -> tuple[Any, ...]:
    """Who works on a tensor, as the first item, and what else tensors must have in common to be worked on together."""
    kind = (tensor.dtype, task_layout(layout, tensor.dim()))
    if not is_dtensor(tensor):
        shared = distribute and not tensor.requires_grad and team_of_all(tensor.device) is not None
        return (_divided, tensor.device, *kind) if shared else (_alone,)
    if tensor.device_mesh.get_coordinate() is None:
        return (_left_alone,)
    spread = spread_of(tensor)
    if spread is None or tensor.requires_grad:  # autograd does not follow what is sent here
        return (_gathered, tensor.device_mesh)
    if stays_at_home(spread, layout):
        return (_at_home, spread_like(tensor))
    return (_exchanged, tensor.device_mesh, *kind)


def _alone(tensors: Sequence[Tensor], layout: Layout, orthogonalize: _Orthogonalize) -> list[Tensor]:
    """Orthogonalize tensors of which this rank does not know that others have them."""
    return orthogonalize(tensors, layout)


def _left_alone(tensors: Sequence[Tensor], layout: Layout, orthogonalize: _Orthogonalize) -> Sequence[Tensor]:  # noqa: ARG001
    """Return tensors as they are: this rank is not on their mesh and holds nothing of them."""
    return tensors


def _gathered(tensors: Sequence[Tensor], layout: Layout, orthogonalize: _Orthogonalize) -> list[Tensor]:
    """Gather and orthogonalize all tensors on every rank, one after the other."""
    return [
        scatter_like(direction, tensor) for tensor in tensors for direction in orthogonalize([whole(tensor)], layout)
    ]


def _at_home(tensors: Sequence[DTensor], layout: Layout, orthogonalize: _Orthogonalize) -> list[Tensor]:
    """Every rank orthogonalizes the matrices that it holds.

    Only tensors with the same placements are worked on together. The bits of a direction may depend on how many
    matrices there are, and copies must get the same bits on all ranks.
    """
    device = torch.device(tensors[0].device_mesh.device_type)
    directions = [torch.empty_like(tensor) for tensor in tensors]
    parts = [local(tensor) for tensor in tensors]
    present = [index for index, part in enumerate(parts) if part.numel()]
    computed = orthogonalize([parts[index].to(device) for index in present], layout)
    for index, direction in zip(present, computed, strict=True):
        local(directions[index]).copy_(direction)
    return directions


def _exchanged(tensors: Sequence[DTensor], layout: Layout, orthogonalize: _Orthogonalize) -> list[Tensor]:
    """Every rank orthogonalizes its share of the matrices; all tensors have one mesh and one dtype."""
    team = team_of(tensors[0].device_mesh)
    dtype = _sent_dtype(tensors[0].dtype, team.device)
    spreads = tuple(_known(spread_of(tensor)) for tensor in tensors)
    parts = [local(tensor) for tensor in tensors]
    for tensor, part, spread in zip(tensors, parts, spreads, strict=True):
        _check_part(tensor, part, spread.held[team.rank])
    directions = [torch.empty_like(tensor) for tensor in tensors]
    targets = [local(direction) for direction in directions]
    for batch in plan(spreads, layout, BATCH_BYTES // dtype.itemsize, team.rank):
        matrices = [torch.empty(shape, dtype=dtype, device=team.device) for shape in batch.shapes]
        _send(team, dtype, (batch.parts_sent, parts), (batch.parts_received, matrices))
        matrices = orthogonalize(matrices, task_layout(layout, tensors[0].dim()))
        _send(team, dtype, (batch.directions_sent, matrices), (batch.directions_received, targets))
    return directions


def _divided(tensors: Sequence[Tensor], layout: Layout, orthogonalize: _Orthogonalize) -> list[Tensor]:
    """Every rank has all matrices and orthogonalizes its share; all tensors have one device and one dtype."""
    team = team_of_all(tensors[0].device)
    assert team is not None
    dtype = _sent_dtype(tensors[0].dtype, team.device)
    shapes = tuple(tensor.shape for tensor in tensors)
    _check_same_on_all_ranks(team, (shapes, dtype, layout))
    directions = [torch.empty_like(tensor) for tensor in tensors]
    spreads = tuple(copied(shape, team.size) for shape in shapes)
    for batch in plan(spreads, layout, BATCH_BYTES // dtype.itemsize, team.rank):
        matrices = [torch.empty(shape, dtype=dtype, device=team.device) for shape in batch.shapes]
        packed = _pack(batch.parts_sent, tensors, dtype, team.device)  # sent to itself
        _unpack(torch.split(packed, batch.parts_sent.counts), batch.parts_received, matrices)
        matrices = orthogonalize(matrices, task_layout(layout, tensors[0].dim()))
        counts = batch.directions_received.counts
        # Every rank gets the same, so what is for the first one is for all. A gather wants it equally long.
        for_each = Message(batch.directions_sent.views[:1])
        gathered = team.gather(_pack(for_each, matrices, dtype, team.device, length=max(counts)))
        received = [flat[:count] for flat, count in zip(gathered, counts, strict=True)]
        _unpack(received, batch.directions_received, directions)
    return directions


def _send(
    team: Team,
    dtype: torch.dtype,
    outgoing: tuple[Message, Sequence[Tensor]],
    incoming: tuple[Message, Sequence[Tensor]],
) -> None:
    """Send parts of tensors to all ranks, and copy what they send to parts of other tensors."""
    (sent, sources), (received, destinations) = outgoing, incoming
    packed = _pack(sent, sources, dtype, team.device)
    _unpack(team.exchange(packed, sent.counts, received.counts), received, destinations)


def _sent_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that is sent: on the CPU the tensors' own, elsewhere bfloat16, that of the iteration."""
    return dtype if device.type == "cpu" else working_dtype(device)


def _pack(
    message: Message, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device, length: int = 0
) -> Tensor:
    """Elements of tensors end to end, for one rank after the other, filled up to a length."""
    flat = [tensors[index][box].to(device, dtype).flatten() for views in message.views for index, box in views]
    missing = max(length - sum(message.counts), 0)
    return torch.cat([*flat, torch.zeros(missing, dtype=dtype, device=device)])


def _unpack(packed: Sequence[Tensor], message: Message, tensors: Sequence[Tensor]) -> None:
    """Copy to tensors what :func:`_pack` put end to end on each rank."""
    for elements, views in zip(packed, message.views, strict=True):
        sizes = [box_size(box) for _, box in views]
        for (index, box), part in zip(views, torch.split(elements, sizes), strict=True):
            view = tensors[index][box]
            view.copy_(part.view(view.shape))


def _known(spread: Spread | None) -> Spread:
    assert spread is not None
    return spread


def _check_part(tensor: DTensor, part: Tensor, ranges: tuple[Ranges, ...]) -> None:
    expected = shape_of(ranges)
    if part.shape != expected and part.numel() + expected.numel():
        raise RuntimeError(
            f"a DTensor of shape {tuple(tensor.shape)}, placed {tensor.placements}, has a local part of shape "
            f"{tuple(part.shape)}, where torch.chunk gives it {tuple(expected)}; "
            "OMADA cannot tell which elements it holds"
        )


@lru_cache(maxsize=64)
def _check_same_on_all_ranks(team: Team, tensors: tuple[Any, ...]) -> None:
    """Raise RuntimeError where ranks have different tensors. Asks once for each set of tensors."""
    number = int.from_bytes(hashlib.sha256(repr(tensors).encode()).digest()[:7], "big")
    if not team.agrees(number):
        raise RuntimeError(
            "distribute=True: the ranks have different matrices, or gradients for different ones, and cannot divide "
            "them; all ranks of the job must train the same model, or leave distribute=False"
        )
