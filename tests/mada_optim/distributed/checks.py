"""What must hold when several processes train one model; :mod:`worlds` runs these functions in each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import TABLE, Net, batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worlds import World

from mada_optim import MADA, OMADA, Family, HypergradientOptimizer
from mada_optim.matrices import Layout, normalize_rows

STEPS = 14
ROWS = {row.name: row for row in TABLE}
# Everything in float64: what is left is the order of sums.
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}

Make = Callable[[Any], HypergradientOptimizer]


# ---- Training alone and together.


def train_share(
    world: World,
    model: nn.Module,
    optimizer: HypergradientOptimizer,
    steps: int = STEPS,
    first: int = 0,
    shares: int | None = None,
    after_backward: Callable[[int], None] = lambda step: None,
) -> tuple[list[float], list[dict[str, int]]]:
    """Train on the process's share of each batch.

    Args:
        shares: into how many a batch is divided, if not one for each process; neighbours get the same then.
        after_backward: called with the step's number.

    Returns:
        The losses of the whole batches, and how often the optimizer's step called which collective.
    """
    shares = shares or world.size
    losses, sent = [], []
    for step in range(first, first + steps):
        x, y = (part.chunk(shares)[world.rank * shares // world.size] for part in batch(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        after_backward(step)
        mode = CommDebugMode()
        with mode:
            optimizer.step()
        sent.append({str(name).split(".")[-1]: count for name, count in mode.get_comm_counts().items()})
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item() / world.size)
    return losses, sent


def train_alone(
    model: nn.Module,
    optimizer: HypergradientOptimizer,
    steps: int = STEPS,
    first: int = 0,
    after_backward: Callable[[int], None] = lambda step: None,
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        after_backward(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close_models(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(a.detach()), whole(b.detach()), **TOLERANCE)


def assert_close_coefficients(one: HypergradientOptimizer, other: HypergradientOptimizer) -> None:
    assert one.coefficients() == pytest.approx(other.coefficients(), rel=0, abs=1e-12)


def assert_same_on_all_ranks(world: World, tensor: Tensor) -> None:
    """Bit for bit."""
    found = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(found, tensor.clone())
    assert all(torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0)) for other in found), found


def learned(optimizer: HypergradientOptimizer) -> Tensor:
    return torch.stack([group["coefficients"] for group in optimizer.param_groups])


def like_one_process(
    world: World,
    spread: Callable[[nn.Module], nn.Module],
    make: Make,
    sharded: bool = True,
    shares: int | None = None,
    after_backward: Callable[[nn.Module], None] = lambda model: None,
    net: Callable[[], nn.Module] = Net,
    steps: int = STEPS,
) -> None:
    """The same losses, parameters and coefficients, and one reduction for each hypergradient that is due."""
    alone, model = net(), net()
    optimizer = make(alone.parameters())
    expected = train_alone(alone, optimizer, steps)
    start = make(net().parameters()).coefficients()

    together = spread(model)
    other = make(together.parameters())
    losses, sent = train_share(
        world, together, other, steps, shares=shares, after_backward=lambda step: after_backward(together)
    )
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)
    assert_close_models(together, alone)
    assert_close_coefficients(other, optimizer)
    assert_same_on_all_ranks(world, learned(other))
    group = other.param_groups[0]
    learns = any(group["hyper_lr"].values())
    assert (other.coefficients() != start) == learns
    for step, calls in enumerate(sent):
        due = step >= max(group["hyper_warmup"], 1) and (step - group["hyper_warmup"]) % group["hyper_every"] == 0
        due = due or group["capturable"]  # where the device decides
        assert calls == ({"allreduce_": 1} if sharded and learns and due else {}), (step, sent)


# ---- How models are spread.


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sharded(model: nn.Module, **kwargs: Any) -> nn.Module:
    """FSDP2. 11 rows, 9 rows, 6 and 3 elements: no size is a multiple of 4, and of 3 elements one rank has none."""
    for module in (model.hidden, model.out):
        fully_shard(module, **kwargs)
    return fully_shard(model, **kwargs)


class EvenNet(Net):
    """Tensor parallelism of two layers divides the size between them evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()


# ---- The checks.


def check_ddp(world: World) -> None:
    for name in ("mada-paper", "mada-every-3", "adamw"):
        like_one_process(world, data_parallel, lambda p, name=name: ROWS[name](p, lr=5e-3), sharded=False)


def check_fsdp(world: World) -> None:
    for name in ("mada-paper", "mada", "mada-every-3", "adamw"):
        like_one_process(world, sharded, lambda p, name=name: ROWS[name](p, lr=5e-3))


def check_fsdp_with_other_kernels(world: World) -> None:
    for kwargs in ({"foreach": False}, {"foreach": True}, {"capturable": True}):
        like_one_process(world, sharded, lambda p, kw=kwargs: ROWS["mada-paper"](p, lr=5e-3, **kw), steps=4)


def check_the_hypergradient_of_the_unclipped_gradient(world: World) -> None:
    """Where parameters are DTensors, so is the norm that clip_grad_norm_ returns."""
    trained = []
    for model, train in ((Net(), train_alone), (sharded(Net()), partial(train_share, world))):
        optimizer = ROWS["mada-paper"](model.parameters(), lr=5e-3)

        def clip(_: int, model: nn.Module = model, optimizer: HypergradientOptimizer = optimizer) -> None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.hyper_grad_scale = (norm / 0.1).clamp(min=1.0)

        train(model, optimizer, 8, after_backward=clip)
        trained.append((model, optimizer))
    (alone, expected), (together, found) = trained
    assert_close_models(together, alone)
    assert_close_coefficients(found, expected)
    assert_same_on_all_ranks(world, learned(found))


def omada(params: Any, shape: tuple[int, int] = (9, 6)) -> HypergradientOptimizer:
    """With the hidden layer's weight, which has this shape, as its one matrix."""
    params = list(params)
    hidden = [param for param in params if param.shape == shape]
    others = [param for param in params if param.shape != shape]
    assert len(hidden) == 1
    return OMADA(
        [{"params": hidden, "matrices": True}, {"params": others}], lr=1e-2, ortho=0.2, hyper_lr={"ortho": 0.1}
    )


def check_omada_with_a_matrix_that_is_cut_up(world: World) -> None:
    """Its direction needs the whole matrix, which one rank gets; its scale needs the way that all shards have gone."""
    for spread in (data_parallel, sharded):
        alone, together = Net(), spread(Net())
        one, other = omada(alone.parameters()), omada(together.parameters())
        expected = train_alone(alone, one)
        losses, _ = train_share(world, together, other)
        assert losses == pytest.approx(expected, rel=0, abs=1e-9)
        assert other.coefficients() == pytest.approx(one.coefficients(), rel=0, abs=1e-9)
        assert other.coefficients()["ortho"] != 0.2
        assert one.scale is not None
        assert other.scale is not None
        assert other.scale.values == pytest.approx(one.scale.values, rel=1e-9)
        assert_same_on_all_ranks(world, learned(other))


def check_rows_of_a_matrix_that_is_cut_up(world: World) -> None:
    """By rows, by columns, both, unevenly; as stacks and as matrices side by side."""
    meshes = [init_device_mesh("cpu", (world.size,)), init_device_mesh("cpu", (2, world.size // 2))]
    generator = torch.Generator().manual_seed(0)
    for shape, layout in (
        ((9, 6), Layout()),
        ((9, 5, 2), Layout()),
        ((3, 4, 5), Layout(stacked=True)),
        ((8, 5), Layout(parts=(2, 1, 1))),
        ((5, 8), Layout(dim=1, parts=(1, 1), repeats=2)),
    ):
        direction, rows = (torch.rand(size, generator=generator).double() for size in (shape, layout.row_shape(shape)))
        expected = normalize_rows(direction, rows, 0.9, layout)
        for mesh, placements in (
            (meshes[0], [Shard(0)]),
            (meshes[0], [Shard(1)]),
            (meshes[0], [Replicate()]),
            (meshes[1], [Shard(0), Shard(0)]),
            (meshes[1], [Shard(1), Shard(0)]),
            (meshes[1], [Replicate(), Shard(1)]),
        ):
            found, moments = normalize_rows(distribute_tensor(direction, mesh, placements), rows, 0.9, layout)
            assert isinstance(found, DTensor)
            assert list(found.placements) == placements
            torch.testing.assert_close((whole(found), moments), expected, **TOLERANCE)
            assert_same_on_all_ranks(world, moments)


def check_rows_under_tensor_parallel_and_fsdp(world: World) -> None:
    """The rows of one matrix are dealt out twice (strided shards), of the other rows and columns."""
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "tensor"))
    alone, together = EvenNet(), EvenNet()
    parallelize_module(together, mesh["tensor"], {"hidden": ColwiseParallel(), "out": RowwiseParallel()})
    sharded(together, mesh=mesh["data"])

    def make(model: nn.Module) -> OMADA:
        groups = [{"params": [model.hidden.weight, model.out.weight], "matrices": True}]
        return OMADA(groups, lr=1e-2, scale=False, row_norm=1.0)

    train_alone(alone, make(alone), 6)
    train_share(world, together, make(together), 6, shares=world.size // 2)
    assert_close_models(together, alone)


def check_fsdp_mixed_with_plain(world: World) -> None:
    """What FSDP ignores, the user averages over the ranks."""

    def spread(model: Net) -> nn.Module:
        return sharded(model, ignored_params=set(model.norm.parameters()))

    def average(model: nn.Module) -> None:
        assert not isinstance(model.norm.weight, DTensor)
        for param in model.norm.parameters():
            dist.all_reduce(param.grad)
            param.grad /= world.size

    like_one_process(world, spread, lambda p: ROWS["mada-paper"](p, lr=5e-3), after_backward=average)


def check_hsdp(world: World) -> None:
    """Copies of shards: 2-D mesh."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    like_one_process(world, partial(sharded, mesh=mesh), lambda p: ROWS["mada-paper"](p, lr=5e-3))


def check_tensor_parallel_and_fsdp(world: World) -> None:
    """Parameters on a 2-D mesh (strided shards), others on one of its dimensions."""
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "tensor"))

    def spread(model: Net) -> nn.Module:
        plan = {"hidden": ColwiseParallel(), "out": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        return sharded(model, mesh=mesh["data"])

    like_one_process(world, spread, lambda p: ROWS["mada-paper"](p, lr=5e-3), shares=world.size // 2, net=EvenNet)


def check_500_steps_bit_for_bit(world: World) -> None:
    """Also where nothing but the optimizer keeps the ranks together: each shard is pulled to a place of its own."""
    mesh = init_device_mesh("cpu", (world.size,))
    plain, cut = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    layer = nn.Linear(3, 5)
    averaged = data_parallel(layer)
    optimizers = [MADA(params, lr=1e-2, hyper_warmup=5) for params in ([plain, cut], averaged.parameters())]
    start = [learned(optimizer).clone() for optimizer in optimizers]
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(world.rank)
    for _ in range(500):
        plain.grad = plain.detach() - 1 + 0.1 * torch.randn(5, 3, generator=shared)
        part = cut.detach().to_local()
        pull = part - world.rank + 0.1 * torch.randn(part.shape, generator=own)
        cut.grad = DTensor.from_local(pull, mesh, [Shard(0)], shape=cut.shape, stride=cut.stride())
        averaged.zero_grad()
        averaged(torch.randn(8, 3, generator=own)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, before in zip(optimizers, start, strict=True):
        assert not torch.equal(learned(optimizer), before)
        assert_same_on_all_ranks(world, learned(optimizer))


def check_nan_on_one_rank(world: World) -> None:
    """All skip. Under DDP the gradient's all-reduce brings the NaN to all, else the hypergradient's."""

    def spoil(model: nn.Module, step: int) -> None:
        if step == 8 and world.rank == world.size - 1:
            param = next(param for param in model.parameters() if local(param.grad).numel())
            local(param.grad).view(-1)[0] = float("nan")

    model = sharded(Net())
    optimizer = ROWS["mada-paper"](model.parameters(), lr=5e-3)
    train_share(world, model, optimizer, 8)
    before = learned(optimizer).clone()
    train_share(world, model, optimizer, 1, first=8, after_backward=lambda step: spoil(model, step))
    assert torch.equal(learned(optimizer), before)
    assert optimizer.skipped_hypergradients == 1
    assert_same_on_all_ranks(world, learned(optimizer))

    model = data_parallel(Net())
    optimizer = ROWS["mada-paper"](model.parameters(), lr=5e-3)
    train_share(world, model, optimizer, 8)
    before = learned(optimizer).clone()
    x, y = batch(8)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    (loss * float("nan") if world.rank == 0 else loss).backward()
    optimizer.step()
    assert torch.equal(learned(optimizer), before)
    assert optimizer.skipped_hypergradients == 1


def check_a_rank_without_gradients_takes_part(world: World) -> None:
    model = sharded(Net())
    optimizer = ROWS["mada-paper"](model.parameters(), lr=5e-3)

    def drop(step: int) -> None:
        if step % 3 == 2 and world.rank == 0:
            optimizer.zero_grad()

    _, sent = train_share(world, model, optimizer, 8, after_backward=drop)
    assert sent == [{}] + 7 * [{"allreduce_": 1}]
    assert_same_on_all_ranks(world, learned(optimizer))
    # No rank has one: nothing is learned from nothing.
    before = learned(optimizer).clone()
    train_share(world, model, optimizer, 1, after_backward=lambda step: optimizer.zero_grad())
    assert torch.equal(learned(optimizer), before)


def check_a_rank_without_gradients_while_the_learning_rate_is_0(world: World) -> None:
    """It has no state, which must not keep it from doing what the others do."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (world.size,)), [Shard(0)]))
    optimizer = MADA([param], lr=0.0, hyper_warmup=1)
    for _ in range(4):
        param.grad = None if world.rank == 0 else torch.ones_like(param.detach())
        optimizer.step()
    assert int(optimizer.param_groups[0]["hyper_steps"]) == 4
    assert_same_on_all_ranks(world, learned(optimizer))


def check_meshes_that_overlap(world: World) -> None:
    """Rows and columns of a grid; what GradScaler found on one process is known to all."""
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "tensor"))
    for options in ({"hyper_per_group": True}, {"hyper_lr": 0.0}):
        params = [
            nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh[name], [Shard(0)])) for name in ("data", "tensor")
        ]
        optimizer = MADA([{"params": [param]} for param in params], hyper_warmup=1, **options)
        for found in (0.0, float(world.rank == world.size - 1)):
            for param in params:
                param.grad = torch.ones_like(param.detach())
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
            del optimizer.found_inf
        assert int(optimizer.param_groups[0]["hyper_steps"]) == 1


def check_copies_get_the_same_noise(world: World) -> None:
    """Also beside a parameter of which the processes have parts of different sizes."""
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "tensor"))
    uneven = nn.Parameter(distribute_tensor(torch.randn(3, 5).bfloat16(), mesh["tensor"], [Shard(0)]))
    copied = nn.Parameter(distribute_tensor(torch.randn(8, 5).bfloat16(), mesh, [Shard(0), Replicate()]))
    optimizer = MADA([uneven, copied], lr=1e-2, stochastic_rounding=True, fused=False)
    for _ in range(3):
        for param in (uneven, copied):
            param.grad = torch.ones_like(param.detach())
        optimizer.step()
    mine = copied.detach().to_local().float()
    found = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(found, mine, group=mesh["tensor"].get_group())
    assert torch.equal(*found)


def check_partial_gradients(world: World) -> None:
    """Tensor parallelism leaves sums over ranks undone."""
    mesh = init_device_mesh("cpu", (world.size,))
    for placement in (Replicate(), Shard(0)):
        torch.manual_seed(0)
        alone = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        param = nn.Parameter(distribute_tensor(alone.detach().clone(), mesh, [placement]))
        optimizers = [ROWS["mada-paper"]([p], lr=5e-3) for p in (alone, param)]
        for _ in range(6):
            alone.grad = torch.randn(5, 3, dtype=torch.float64)
            param.grad = DTensor.from_local(alone.grad / world.size, mesh, [Partial()])
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(whole(param.detach()), alone.detach(), **TOLERANCE)
        assert_close_coefficients(optimizers[1], optimizers[0])


def check_what_is_refused(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    cut = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    copied = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Replicate()]))
    with pytest.raises(TypeError, match="not elementwise"):
        HypergradientOptimizer([cut], WholeMatrix())
    HypergradientOptimizer([copied], WholeMatrix())
    swapped = HypergradientOptimizer([copied], WholeMatrix())
    swapped.param_groups[0]["params"] = [cut]  # as accelerate does
    cut.grad = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    with pytest.raises(TypeError, match="not elementwise"):
        swapped.step()
    partial_sum = nn.Parameter(DTensor.from_local(torch.zeros(5, 3), mesh, [Partial()]))
    with pytest.raises(TypeError, match="partial sum"):
        MADA([partial_sum])
    other = init_device_mesh("cpu", (1, world.size))
    optimizer = MADA([cut, copied])
    cut.grad = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    copied.grad = distribute_tensor(torch.ones(5, 3), other, [Replicate(), Replicate()])
    with pytest.raises(RuntimeError, match="not spread over the same processes"):
        optimizer.step()
    assert not optimizer.state


class WholeMatrix(Family):
    """Needs whole tensors."""

    coefficients = ()
    elementwise = False

    def buffers(self, q: Any) -> tuple[str, ...]:
        return ()

    def update(self, state: Any, grad: Tensor, q: Any, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return grad / grad.norm(), {}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
