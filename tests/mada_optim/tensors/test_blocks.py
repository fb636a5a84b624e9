"""Cutting and joining tensors changes nothing but the time it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import IDS, TABLE, Net, Row, train

from mada_optim.tensors import blocks


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=6), size=st.integers(1, 40))
def test_every_element_is_in_one_block(shapes, size):
    tensors = [{"a": torch.zeros(shape), "b": torch.zeros(shape)} for shape in shapes]
    for block in blocks.make_blocks(tensors, elementwise=True, size=size):
        for role in ("a", "b"):
            block.write(role, block.read(role, torch.float64) + 1)
    for roles in tensors:
        assert (roles["a"] == 1).all()
        assert (roles["b"] == 1).all()


def test_blocks_are_of_the_size_asked_for():
    tensors = [{"a": torch.zeros(shape)} for shape in [(100, 7), (3,), (2, 2), (), (5,), (60,)]]
    sizes = [sum(m["a"].numel() for m in block.members) for block in blocks.make_blocks(tensors, True, size=70)]
    assert sizes == [70] * 10 + [13, 60]


def test_whole_tensors_where_the_update_is_not_elementwise():
    tensors = [{"a": torch.zeros(100, 7)}, {"a": torch.zeros(3)}, {"a": torch.zeros(0)}]
    made = list(blocks.make_blocks(tensors, elementwise=False, size=10))
    assert [block.members[0]["a"].shape for block in made] == [(100, 7), (3,)]


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_the_size_of_blocks_does_not_change_the_training(row: Row, monkeypatch):
    results = []
    for size in (1, 16, 1 << 17):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", size)
        model = Net()
        optimizer = row(model.parameters(), lr=1e-2)
        train(model, optimizer, 8)
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)
