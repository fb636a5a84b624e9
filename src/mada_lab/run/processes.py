"""The processes that train one model together, as torchrun starts them; one process without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mada_lab.errors import InputError
from mada_lab.tasks.base import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among ``size``; ``local_rank`` counts those of one host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process; each has a GPU of its own."""
        if self.size == 1 or name != "cuda":
            return torch.device(name)
        torch.cuda.set_device(self.local_rank)
        return torch.device(name, self.local_rank)

    def spread(self, model: nn.Module) -> nn.Module:
        """The model that averages its gradients over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, batch: Batch, accumulate: int = 1) -> list[Batch]:
        """Return this process's part of a batch, in ``accumulate`` micro-batches.

        All are of one size, so that the mean of their losses over the processes is the batch's loss.
        """
        parts = self.size * accumulate
        if len(batch[0]) % parts:
            what = "the number of processes" if accumulate == 1 else "the number of processes times accumulate"
            raise InputError(f"batch must be a multiple of {what}, {parts}, got {len(batch[0])}")
        mine = slice(self.rank * accumulate, (self.rank + 1) * accumulate)
        return list(zip(*(tensor.chunk(parts)[mine] for tensor in batch), strict=True))

    def averaging(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Return a context for a backward pass: average the spread model's gradients ``now``, or in a later one."""
        if now or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return cast("AbstractContextManager[None]", model.no_sync())

    def least(self, values: Tensor) -> Tensor:
        """The least of each value over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            values = values / self.size
            dist.all_reduce(values)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; the others wait for it."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(made)
        return cast(T, made[0])


def restarts() -> int:
    """Return how often torchrun has started these processes again, after one of them failed (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Meet the other processes, if torchrun started any; the variables it sets say who and where they are."""
    # Schedulers set WORLD_SIZE, too, where nobody else will come.
    size = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if size == 1:
        yield Processes()
        return
    from torch.distributed.rendezvous import rendezvous  # not there in every torch

    store, rank, size = next(rendezvous("env://"))
    # torchrun may keep the store when it starts again: the addresses of those who are gone would be in it.
    store = dist.PrefixStore(f"mada-{restarts()}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Processes(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
