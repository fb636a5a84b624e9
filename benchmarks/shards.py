"""What the orthogonalization of matrices that are spread over ranks costs: all gathered by every rank, or divided.

    python benchmarks/shards.py --ranks 2 4 --width 256

prints what the busiest rank sends, computes and needs, for hidden matrices like GPT-2's and for stacks of experts. Sent
are elements that go to other ranks, times their size; a gather counts as a ring. FLOP are those of matrix products; a
symmetric product counts half. The peak is the largest sum of the storages of tensors at a time, beside the inputs. All
of that is exact. Seconds are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mada_optim.matrices import Layout, newton_schulz, orthogonalize, orthogonalize_shared, shards
from mada_optim.tensors.distributed import scatter_like, whole

Work = Callable[[list[Tensor], Layout], Sequence[Tensor]]


class Meter(TorchDispatchMode):
    """Bytes that this rank sends, and the most bytes of tensors that exist at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls operators of its local tensors, which come here
        self._count(str(func), args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out

    def _count(self, name: str, args: Any) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        if "alltoall_base" in name:
            sent, counts = args[1], args[4]
            self.sent += (sent.numel() - counts[rank]) * sent.element_size()
        elif name.startswith("_c10d_functional.all_gather_into_tensor"):
            self.sent += args[0].numel() * args[0].element_size() * (args[1] - 1)
        elif "_allgather_base" in name:
            self.sent += args[1].numel() * args[1].element_size() * (size - 1)
        elif any(other in name for other in ("reduce", "broadcast", "c10d.scatter", "all_to_all")):
            raise NotImplementedError(f"how much {name} sends")


@contextmanager
def counted_products() -> Iterator[list[float]]:
    """Yield a list to which each product of matrices adds its floating-point operations."""
    operations: list[float] = []
    multiply = newton_schulz.multiply

    def count(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        share = 0.5 if options.get("symmetric") else 1.0
        operations.append(2.0 * a.numel() * b.size(2) * share)
        return multiply(a, b, **options)

    newton_schulz.multiply = count
    try:
        yield operations
    finally:
        newton_schulz.multiply = multiply


def all_gathered(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """Every rank has all matrices whole at once and orthogonalizes all, as before matrices were divided."""
    directions = orthogonalize([whole(tensor) for tensor in tensors], layout)
    return [scatter_like(direction, tensor) for direction, tensor in zip(directions, tensors, strict=True)]


def divided(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    return orthogonalize_shared(tensors, layout)


def divided_plain(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    return orthogonalize_shared(tensors, layout, distribute=True)


def hidden_matrices(width: int, layers: int) -> list[Tensor]:
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [torch.randn(shape) for _ in range(layers) for shape in shapes]


def experts(width: int, layers: int) -> list[Tensor]:
    """Eight in each layer, half as wide as the hidden matrices are."""
    width //= 2
    return [torch.randn(8, *shape) for _ in range(layers) for shape in ((4 * width, width), (width, 4 * width))]


def measure(rank: int, size: int, arguments: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    shards.BATCH_BYTES = arguments.batch * 2**20
    line = init_device_mesh("cpu", (size,))
    hidden, stacks = hidden_matrices(arguments.width, arguments.layers), experts(arguments.width, arguments.layers)
    one, stacked = Layout(), Layout(stacked=True)
    cases: list[tuple[str, Any, Any, list[Tensor], Layout]] = [
        ("FSDP2, rows", line, [Shard(0)], hidden, one),
        ("experts, dimension 0", line, [Shard(0)], stacks, stacked),
        ("experts, rows", line, [Shard(1)], stacks, stacked),
        ("DDP", None, None, hidden, one),
    ]
    if size >= 4:
        square = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("first", "second"))
        cases += [
            ("HSDP", square, [Replicate(), Shard(0)], hidden, one),
            ("experts and rows", square, [Shard(0), Shard(1)], stacks, stacked),
        ]
    for name, mesh, placements, tensors, layout in cases:
        if mesh is not None:
            tensors = [distribute_tensor(tensor, mesh, placements, src_data_rank=None) for tensor in tensors]
        works: list[tuple[str, Work]] = [
            ("all" if mesh is None else "all gathered", all_gathered),
            ("divided", divided_plain if mesh is None else divided),
        ]
        for label, work in works:
            work(tensors, layout)  # plans
            with Meter() as meter, counted_products() as operations:
                directions = work(tensors, layout)
            del directions
            seconds = [timed(work, tensors, layout) for _ in range(arguments.repeats)]
            row = torch.tensor(
                [meter.sent / 2**20, meter.peak / 2**20, sum(operations) / 1e9, statistics.median(seconds)],
                dtype=torch.float64,
            )
            rows = [torch.empty_like(row) for _ in range(size)]
            dist.all_gather(rows, row)
            sent, peak, gigaflops, median = torch.stack(rows).amax(0).tolist()
            if rank == 0:
                print(
                    f"| {size} | {name} | {label} | {sent:.1f} | {peak:.1f} | {gigaflops:.2f} | {median:.2f} |",
                    flush=True,
                )
    dist.destroy_process_group()


def timed(work: Work, tensors: list[Tensor], layout: Layout) -> float:
    dist.barrier()
    start = time.perf_counter()
    work(tensors, layout)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--width", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=12, help="number of layers")
    parser.add_argument("--batch", type=int, default=shards.BATCH_BYTES // 2**20, help="MiB of a batch")
    parser.add_argument("--repeats", type=int, default=5, help="how often to measure seconds")
    arguments = parser.parse_args()
    print("| ranks | matrices | work | MiB sent | MiB peak | GFLOP | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (ranks, arguments, str(Path(folder) / "store")), nprocs=ranks)


if __name__ == "__main__":
    main()
