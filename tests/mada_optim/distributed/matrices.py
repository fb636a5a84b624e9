"""Ranks that divide the orthogonalization of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from checks import EvenNet, assert_same_on_all_ranks, omada, sharded, train_alone, train_share, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from worlds import World

from mada_optim import OMADA
from mada_optim.matrices import Layout, orthogonalize, orthogonalize_shared, shards

# Rounding of the iteration in float32: a product may add in another order when there are more matrices.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}

LAYOUTS = {
    "one": (Layout(), [(11, 6), (3, 8), (16, 8), (6, 5, 2, 3)]),
    "rows": (Layout(parts=(4, 1, 1)), [(12, 8), (18, 4)]),
    "heads": (Layout(parts=(2, 1, 1), repeats=2), [(16, 6)]),
    "columns": (Layout(dim=1, parts=(1, 1, 1)), [(6, 12), (7, 9), (4, 3, 2, 2)]),
    "stack": (Layout(stacked=True), [(6, 5, 4), (3, 4, 7), (8, 3, 2, 2)]),
    "gate and up": (Layout(stacked=True, dim=1, parts=(1, 1)), [(4, 3, 8), (5, 7, 4)]),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def grid(world: World) -> DeviceMesh:
    return init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "tensor"))


def placements(world: World) -> list[tuple[DeviceMesh, list[Any]]]:
    line, square = init_device_mesh("cpu", (world.size,)), grid(world)
    on_square: list[list[Any]] = [
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Replicate(), Replicate()],
    ]
    return [
        *((line, [placement]) for placement in (Shard(0), Shard(1), Replicate())),
        *((square, both) for both in on_square),
        (square["tensor"], [Shard(0)]),
        (square["data"], [Shard(1)]),
    ]


def assert_as_alone(world: World, tensors: Sequence[Tensor], layout: Layout, **kwargs: Any) -> None:
    alone = orthogonalize([whole(tensor) for tensor in tensors], layout)
    for tensor, direction, expected in zip(
        tensors, orthogonalize_shared(tensors, layout, **kwargs), alone, strict=True
    ):
        assert direction.dtype == tensor.dtype
        assert isinstance(direction, DTensor) == isinstance(tensor, DTensor)
        if isinstance(tensor, DTensor):
            assert (direction.placements, direction.device_mesh) == (tensor.placements, tensor.device_mesh)
            assert direction.to_local().shape == tensor.to_local().shape
        torch.testing.assert_close(whole(direction), expected, **TOLERANCE)
        assert_same_on_all_ranks(world, whole(direction))


def check_directions_as_alone(world: World) -> None:
    """All shapes in all placements, on all meshes, and plain ones among them, in one call."""
    for layout, shapes in LAYOUTS.values():
        tensors = [
            distribute_tensor(random(*shape, seed=seed), mesh, placed, src_data_rank=None)
            for seed, (mesh, placed) in enumerate(placements(world))
            for shape in shapes
        ]
        assert_as_alone(world, [*tensors[::2], random(*shapes[0]), *tensors[1::2]], layout)


def check_directions_in_float32_and_bfloat16(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for dtype in (torch.float32, torch.bfloat16):
        tensor = distribute_tensor(random(9, 5, dtype=torch.float32).to(dtype), mesh, [Shard(0)], src_data_rank=None)
        assert_as_alone(world, [tensor], Layout())


def check_what_is_sent_in_bfloat16(world: World) -> None:
    """As on accelerators, whose iteration works in it: half of the bytes, and its rounding in the directions."""
    mesh = init_device_mesh("cpu", (world.size,))
    weight = random(9, 5, dtype=torch.float32)
    tensor = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_sent_dtype", lambda dtype, device: torch.bfloat16)
        found = [*orthogonalize_shared([tensor], Layout()), *orthogonalize_shared([weight], Layout(), distribute=True)]
    (rounded,), (exact,) = orthogonalize([weight.bfloat16()]), orthogonalize([weight])
    for direction in found:
        torch.testing.assert_close(whole(direction), rounded.float(), rtol=2**-7, atol=0.0)  # the last bit
        assert not torch.equal(whole(direction), exact)


def check_directions_of_unknown_placements(world: World) -> None:
    """Tensor parallelism that cuts unevenly: gathered, as torch gathers it."""
    tensor = distribute_tensor(
        random(5, 3), grid(world), [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None
    )
    assert shards.spread_of(tensor) is None
    assert_as_alone(world, [tensor], Layout())


def check_directions_of_fsdp_over_tensor_parallelism(world: World) -> None:
    """The strided shards that FSDP2 itself makes, uneven ones."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5)).double()
    weights = [random(*layer.weight.shape) for layer in model]
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(weight)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    tensors = [layer.weight.detach() for layer in model]
    assert len(tensors[0].placements) == 2
    for direction, expected in zip(orthogonalize_shared(tensors, Layout()), orthogonalize(weights), strict=True):
        torch.testing.assert_close(whole(direction), expected, **TOLERANCE)


def check_directions_on_a_mesh_of_some_ranks(world: World) -> None:
    mesh = DeviceMesh("cpu", list(range(world.size - 1)))
    tensor = distribute_tensor(random(5, 3), mesh, [Shard(0)], src_data_rank=None)
    everywhere = distribute_tensor(random(5, 4), init_device_mesh("cpu", (world.size,)), [Shard(0)], src_data_rank=None)
    direction, other = orthogonalize_shared([tensor, everywhere], Layout())
    torch.testing.assert_close(whole(other), orthogonalize([random(5, 4)])[0], **TOLERANCE)
    if world.rank < world.size - 1:
        torch.testing.assert_close(whole(direction), orthogonalize([random(5, 3)])[0], **TOLERANCE)
    else:
        assert direction.to_local().numel() == 0


def check_parts_that_torch_would_not_make(world: World) -> None:
    """Which elements they hold is not guessed."""
    mesh = init_device_mesh("cpu", (world.size,))
    sizes = {2: (1, 2), 4: (0, 1, 3, 4)}[world.size]
    part = random(sizes[world.rank], 3)
    tensor = DTensor.from_local(part, mesh, [Shard(0)], shape=torch.Size((sum(sizes), 3)), stride=(3, 1))
    with pytest.raises(RuntimeError, match="has a local part of shape"):
        orthogonalize_shared([tensor], Layout())


def check_omada_on_meshes_of_two_dimensions(world: World) -> None:
    """Copies of shards, and FSDP2 over tensor parallelism."""

    def copies(model: nn.Module) -> nn.Module:
        return sharded(model, mesh=init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("copy", "shard")))

    def tensor_parallel(model: nn.Module) -> nn.Module:
        mesh = grid(world)
        parallelize_module(model, mesh["tensor"], {"hidden": ColwiseParallel(), "out": RowwiseParallel()})
        return sharded(model, mesh=mesh["data"])

    for spread, shares in ((copies, world.size), (tensor_parallel, world.size // 2)):
        alone, together = EvenNet(), spread(EvenNet())
        one, other = (omada(model.parameters(), (8, 6)) for model in (alone, together))
        expected = train_alone(alone, one, 6)
        losses, sent = train_share(world, together, other, 6, shares=shares)
        assert losses == pytest.approx(expected, rel=0, abs=1e-9)
        whole_copies = spread is copies and world.size == 2
        assert [calls.get("alltoall_base_", 0) for calls in sent] == [0 if whole_copies else 2] * 6
        assert not any("gather" in name for calls in sent for name in calls)


# ---- Who does what, and what is sent.


@contextmanager
def recorded() -> Iterator[list[torch.Size]]:
    """The shapes of the tensors that this rank orthogonalizes."""
    shapes: list[torch.Size] = []

    def record(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
        shapes.extend(tensor.shape for tensor in tensors)
        return orthogonalize(tensors, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "orthogonalize", record)
        yield shapes


def collectives(tensors: Sequence[Tensor], layout: Layout, **kwargs: Any) -> tuple[dict[str, int], int]:
    """How often which collective is called, and how many elements this rank orthogonalizes."""
    with CommDebugMode() as mode, recorded() as shapes:
        orthogonalize_shared(tensors, layout, **kwargs)
    counts = {str(name).split(".")[-1]: count for name, count in mode.get_comm_counts().items()}
    return counts, sum(shape.numel() for shape in shapes)


def check_each_matrix_has_one_rank(world: World) -> None:
    line, square = init_device_mesh("cpu", (world.size,)), grid(world)
    for mesh, placed in ((line, [Shard(0)]), (line, [Shard(1)]), (square, [Replicate(), Shard(0)])):
        if mesh is square and world.size == 2:
            continue
        tensors = [
            distribute_tensor(random(6, 4, seed=seed), mesh, placed, src_data_rank=None)
            for seed in range(2 * world.size)
        ]
        assert collectives(tensors, Layout()) == ({"alltoall_base_": 2}, 2 * 24)
    fused = distribute_tensor(random(6 * world.size, 4), line, [Shard(0)], src_data_rank=None)
    assert collectives([fused], Layout(parts=(1,) * world.size)) == ({"alltoall_base_": 2}, 24)
    # A stack of which no rank has a whole matrix: each gets as many.
    stack = distribute_tensor(random(2 * world.size, 4, 5), line, [Shard(1)], src_data_rank=None)
    assert collectives([stack], Layout(stacked=True)) == ({"alltoall_base_": 2}, 2 * 20)


def check_batches_are_bounded(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    tensors = [
        distribute_tensor(random(6, 4, seed=seed), mesh, [Shard(0)], src_data_rank=None)
        for seed in range(3 * world.size)
    ]
    tensors.append(distribute_tensor(random(30, 8), mesh, [Shard(0)], src_data_rank=None))  # larger than a batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_BYTES", 2 * 24 * 8)
        assert_as_alone(world, tensors, Layout())
        counts, _ = collectives(tensors[:-1], Layout())
    assert counts == {"alltoall_base_": 4}  # three matrices for each rank, two in a batch


def check_experts_and_copies_send_nothing(world: World) -> None:
    line, square = init_device_mesh("cpu", (world.size,)), grid(world)
    stacked = Layout(stacked=True)
    experts = distribute_tensor(random(2 * world.size, 4, 3), line, [Shard(0)], src_data_rank=None)
    assert collectives([experts], stacked) == ({}, 2 * 12)
    uneven = distribute_tensor(random(2 * world.size - 1, 4, 3), line, [Shard(0)], src_data_rank=None)
    assert collectives([uneven], stacked)[0] == {}
    over_both = distribute_tensor(random(8, 4, 3), square, [Shard(0), Shard(0)], src_data_rank=None)
    assert collectives([over_both], stacked)[0] == {}
    strided = distribute_tensor(
        random(8, 4, 3), square, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None
    )
    assert collectives([strided], stacked)[0] == {}
    copy = distribute_tensor(random(4, 3), line, [Replicate()], src_data_rank=None)
    assert collectives([copy], Layout()) == ({}, 12)


def check_experts_stay_among_the_ranks_that_hold_them(world: World) -> None:
    """Experts over one dimension of a mesh, rows over the other: nothing goes from one row of the mesh to the next."""
    square = grid(world)
    experts = distribute_tensor(random(4, 6, 5), square, [Shard(0), Shard(1)], src_data_rank=None)
    crossed = []

    def send(self: Any, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Sequence[Tensor]:
        crossed.extend(sent_counts[other] for other in range(world.size) if other // 2 != world.rank // 2)
        return exchange(self, sent, sent_counts, received_counts)

    exchange = shards.Team.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Team, "exchange", send)
        assert_as_alone(world, [experts], Layout(stacked=True))
    assert not any(crossed)


def check_ranks_without_experts_help(world: World) -> None:
    """Fewer experts than half of the ranks: their matrices are sent, as the others would be idle."""
    if world.size < 4:
        return
    mesh = init_device_mesh("cpu", (world.size,))
    layers = [distribute_tensor(random(1, 4, 3, seed=seed), mesh, [Shard(0)], src_data_rank=None) for seed in range(4)]
    assert collectives(layers, Layout(stacked=True)) == ({"alltoall_base_": 2}, 12)
    assert_as_alone(world, layers, Layout(stacked=True))


# ---- Plain tensors.


def check_plain_matrices_are_divided_where_asked_for(world: World) -> None:
    for layout, shapes in LAYOUTS.values():
        assert_as_alone(world, [random(*shape) for shape in shapes], layout, distribute=True)
    tensors = [random(6, 4, seed=seed) for seed in range(2 * world.size)]
    assert collectives(tensors, Layout()) == ({}, len(tensors) * 24)
    orthogonalize_shared(tensors, Layout(), distribute=True)  # asks once whether all ranks have the same
    assert collectives(tensors, Layout(), distribute=True) == ({"_allgather_base_": 1}, 2 * 24)


def check_plain_matrices_that_differ_are_refused(world: World) -> None:
    tensors = [random(6, 4), random(5, 4 + (world.rank == 1))]
    with pytest.raises(RuntimeError, match="the ranks have different matrices"):
        orthogonalize_shared(tensors, Layout(), distribute=True)


def check_omada_divides_a_model_of_ddp(world: World) -> None:
    """Also a parameter that has no gradient on any rank."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [OMADA(model, lr=1e-2, distribute=model is models[1]) for model in models]
    for step in range(4):
        x = random(5, 6, seed=step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model[0](x).square().mean() if step == 2 else model(x).square().mean()).backward()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
        assert_same_on_all_ranks(world, other.detach())
