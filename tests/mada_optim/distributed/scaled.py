"""The learned scale when several processes train one model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from checks import assert_close_models, assert_same_on_all_ranks, data_parallel, sharded, train_alone, train_share
from problems import Net
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from worlds import World

from mada_optim.scale import LearnedScale, SearchSettings

SEARCH = 8
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def scaled(model: nn.Module) -> tuple[AdamW, LearnedScale]:
    optimizer = AdamW(model.parameters(), lr=0.01)
    return optimizer, LearnedScale(optimizer, settings=SearchSettings(steps=SEARCH))


def like_one_process(world: World, spread: Callable[[nn.Module], nn.Module], collective: bool) -> None:
    alone, together = Net(), spread(Net())
    optimizer, scale = scaled(alone)
    expected = train_alone(alone, optimizer, 14)  # type: ignore[arg-type]
    other, found = scaled(together)
    losses, sent = train_share(world, together, other, 14)  # type: ignore[arg-type]
    assert losses == pytest.approx(expected, rel=0, abs=1e-10)
    assert_close_models(together, alone)
    assert found.value == pytest.approx(scale.value, rel=1e-10)
    assert_same_on_all_ranks(world, torch.tensor(found.value, dtype=torch.float64))
    assert sent == [{"allreduce_": 1}] * (SEARCH if collective else 0) + [{}] * (14 - SEARCH if collective else 14)


def check_scale_ddp(world: World) -> None:
    like_one_process(world, data_parallel, collective=False)


def check_scale_fsdp(world: World) -> None:
    like_one_process(world, sharded, collective=True)


def check_scale_hsdp(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    like_one_process(world, lambda model: sharded(model, mesh=mesh), collective=True)


def check_scale_resumes(world: World) -> None:
    """From torch.distributed's state_dict, in the middle of the search and after it."""
    for cut in (5, 11):
        model = sharded(Net())
        optimizer, scale = scaled(model)
        train_share(world, model, optimizer, cut)  # type: ignore[arg-type]
        saved = copy.deepcopy(get_state_dict(model, optimizer))
        flat = get_state_dict(model, optimizer, options=FLAT)[1]
        train_share(world, model, optimizer, 14 - cut, first=cut)  # type: ignore[arg-type]
        again = sharded(Net(seed=1))
        optimizer, found = scaled(again)
        set_state_dict(again, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        assert found.searching == (cut < SEARCH)
        train_share(world, again, optimizer, 14 - cut, first=cut)  # type: ignore[arg-type]
        assert found.value == scale.value
        if cut > SEARCH:
            other = sharded(Net(seed=1))
            optimizer, found = scaled(other)
            set_state_dict(other, optimizer, model_state_dict=saved[0], optim_state_dict=flat, options=FLAT)
            assert (found.value, found.searching) == (scale.value, False)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())  # type: ignore[attr-defined]
