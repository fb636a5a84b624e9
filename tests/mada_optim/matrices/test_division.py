"""Which rank orthogonalizes which matrices. What they send is checked in ``distributed/matrices.py``."""

from __future__ import annotations

import pytest
import torch

from mada_optim import OMADA
from mada_optim.matrices import Layout, orthogonalize, orthogonalize_shared
from mada_optim.matrices.division import Task, copied, divide, plan
from mada_optim.tensors.distributed import Spread

NO_LIMIT = 10**9
GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def in_rows(shape: tuple[int, ...], ranks: int, dim: int = 0) -> Spread:
    """As FSDP2 cuts a tensor."""
    chunks = [chunk.tolist() for chunk in torch.arange(shape[dim]).chunk(ranks)]
    held = []
    for rank in range(ranks):
        ranges = [((0, size),) for size in shape]
        ranges[dim] = ((chunks[rank][0], chunks[rank][-1] + 1),) if rank < len(chunks) else ()  # type: ignore[assignment]
        held.append(tuple(ranges))
    return Spread(torch.Size(shape), tuple(held), ((),) * ranks)


def cost(task: Task, stacked: bool = False) -> float:
    count, rows, columns = task.shape if stacked else (1, *task.shape)
    return count * min(rows, columns) ** 2 * (rows + columns)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_all_ranks_have_about_the_same_to_compute(ranks: int) -> None:
    tasks = divide(tuple(in_rows(shape, ranks) for shape in GPT2), Layout(), NO_LIMIT)
    loads = [sum(cost(task) for task in tasks if task.owner == rank) for rank in range(ranks)]
    assert len(tasks) == len(GPT2)
    assert max(loads) <= sum(loads) / ranks + max(map(cost, tasks))


@pytest.mark.parametrize("layout", [Layout(parts=(2, 1, 1), repeats=2), Layout(stacked=True, dim=1, parts=(1, 3))])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_each_element_is_in_one_task(layout: Layout, ranks: int) -> None:
    for dim in (0, 1):
        counts = torch.zeros(16, 8, 12)
        for task in divide((in_rows((16, 8, 12), ranks, dim),), layout, NO_LIMIT):
            index = torch.meshgrid(
                *(torch.cat([torch.arange(*span) for span in ranges]) for ranges in task.ranges), indexing="ij"
            )
            counts[index] += 1
        assert counts.eq(1).all()


def test_what_is_sent_in_a_batch_is_bounded() -> None:
    limit = 4 * 768 * 768
    spreads = tuple(in_rows(shape, 8) for shape in GPT2)
    largest = max(torch.Size(shape).numel() for shape in GPT2)
    for rank in range(8):
        batches = plan(spreads, Layout(), limit, rank)
        assert len(batches) > 3
        for batch in batches:
            for message in (batch.parts_sent, batch.parts_received, batch.directions_sent, batch.directions_received):
                assert sum(message.counts) <= max(limit, largest)


def test_ranks_send_what_the_others_expect() -> None:
    spreads = tuple(in_rows(shape, 4) for shape in [(10, 7), (3, 5), (6, 6), (1, 4)])
    plans = [plan(spreads, Layout(), 60, rank) for rank in range(4)]
    assert len({len(batches) for batches in plans}) == 1
    for batches in zip(*plans, strict=True):
        for sender in range(4):
            for receiver in range(4):
                sent, received = batches[sender], batches[receiver]
                assert sent.parts_sent.counts[receiver] == received.parts_received.counts[sender]
                assert sent.directions_sent.counts[receiver] == received.directions_received.counts[sender]


def test_a_large_stack_makes_few_tasks() -> None:
    """128 experts, of which each of 8 ranks has some rows: as many tasks as ranks."""
    tasks = divide((in_rows((128, 64, 32), 8, dim=1),), Layout(stacked=True), NO_LIMIT)
    assert [task.shape for task in tasks] == [torch.Size((16, 64, 32))] * 8
    assert sorted(task.owner for task in tasks) == list(range(8))


def test_copies_are_divided() -> None:
    tasks = divide((copied(torch.Size((6, 4, 4)), 3), copied(torch.Size((4, 3, 3)), 3)), Layout(stacked=True), NO_LIMIT)
    loads = [sum(cost(task, stacked=True) for task in tasks if task.owner == rank) for rank in range(3)]
    assert max(loads) < 1.5 * min(loads)


def test_tensors_without_elements_make_no_task() -> None:
    assert divide((in_rows((4, 3), 2), copied(torch.Size((0, 3)), 2)), Layout(), NO_LIMIT)[0].tensor == 0
    assert plan((copied(torch.Size((0, 3)), 2),), Layout(), NO_LIMIT, 0) == []


def test_one_process_has_nothing_to_divide() -> None:
    tensors = [torch.randn(4, 3), torch.randn(3, 4)]
    for alone, shared in zip(
        orthogonalize(tensors), orthogonalize_shared(tensors, Layout(), distribute=True), strict=True
    ):
        assert torch.equal(alone, shared)
    with pytest.raises(TypeError, match="distribute must be a bool"):
        OMADA(torch.nn.Linear(3, 4), distribute="ddp")  # type: ignore[arg-type]
