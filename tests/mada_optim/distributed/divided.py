"""Parameters that are divided among processes without the optimizer being told, or that have no values at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import (
    ROWS,
    WholeMatrix,
    assert_close_coefficients,
    assert_close_models,
    assert_same_on_all_ranks,
    data_parallel,
    learned,
    sharded,
    train_alone,
    train_share,
    whole,
)
from problems import Net, loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import distribute_tensor
from worlds import World

from mada_optim import MADA, AVGrad, HypergradientOptimizer, LearnedScale, load_optimizer

STEPS = 6
TO_DO = "fully_shard.*DistributedDataParallel.*hyper_lr=0.0"


# ---- FSDP1 and ZeRO: nothing can be learned, all else works.


def flattened(model: nn.Module, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0) -> None:
    for step in range(first, first + STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def check_fsdp1_does_not_learn(world: World) -> None:
    for use_orig_params in (True, False):
        model = flattened(Net(), use_orig_params)
        with pytest.raises(RuntimeError, match=f"FSDP1.*{TO_DO}"):
            MADA(model.parameters())
        with pytest.raises(RuntimeError, match="FSDP1.*scale=False"):
            AVGrad(model.parameters(), scale=True)
        with pytest.raises(RuntimeError, match="FSDP1.*scale=False"):
            LearnedScale(torch.optim.AdamW(model.parameters()))
        expected = flattened(Net(), use_orig_params)
        adamw = torch.optim.AdamW(expected.parameters(), lr=1e-2)
        ours = load_optimizer("adamw")(model.parameters(), lr=1e-2)
        steps(expected, adamw)
        steps(model, ours)
        assert_same(model, expected)
        # Learning that begins later.
        for group in ours.param_groups:
            group["hyper_lr"] = {**group["hyper_lr"], "beta1": 0.1}
        with pytest.raises(RuntimeError, match="FSDP1"):
            steps(model, ours)
        with pytest.raises(TypeError, match="not elementwise.*FSDP1"):
            HypergradientOptimizer(model.parameters(), WholeMatrix())


def check_fsdp1_after_the_optimizer(world: World) -> None:
    """As accelerate does it."""
    model = Net()
    optimizer = MADA(model.parameters())
    with pytest.raises(RuntimeError, match="FSDP1"):
        steps(flattened(model, use_orig_params=True), optimizer)
    assert not optimizer.state


def check_zero_does_not_learn(world: World) -> None:
    for options in ({}, {"hyper_lr": 0.1}, {"hyper_lr": {"rho": 0.1}, "hyper_warmup": 5, "bounds": {"rho": (0.5, 1)}}):
        with pytest.raises(RuntimeError, match=f"ZeroRedundancyOptimizer.*{TO_DO}"):
            ZeroRedundancyOptimizer(Net().parameters(), MADA, lr=1e-2, **options)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99)}
    for make, arguments in ((MADA, {"hyper_lr": 0.0}), (MADA, {"hyper_lr": 0.0, "rho": 0.5}), (AVGrad, {})):
        divided, alone = data_parallel(Net()), data_parallel(Net())
        zero = ZeroRedundancyOptimizer(divided.parameters(), make, **settings, **arguments)
        optimizer = make(alone.parameters(), **settings, **arguments)
        steps(divided, zero)
        steps(alone, optimizer)
        assert_same(divided, alone)
        # A state that is gathered and goes on.
        zero.consolidate_state_dict(to=0)
        objects = [zero.state_dict() if world.rank == 0 else None]
        dist.broadcast_object_list(objects)
        other = data_parallel(Net(seed=1))
        other.load_state_dict(divided.state_dict())
        resumed = ZeroRedundancyOptimizer(other.parameters(), make, **settings, **arguments)
        resumed.load_state_dict(objects[0])
        steps(other, resumed, first=STEPS)
        steps(alone, optimizer, first=STEPS)
        assert_same(other, alone)
    # Learning that begins later.
    for group in zero.param_groups:
        group["hyper_lr"] = {**group["hyper_lr"], "beta1": 0.1}
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer"):
        steps(divided, zero)


# ---- Parameters on the meta device when the optimizer is made: the order of FSDP2's documents.


def sharded_on_meta() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    return sharded(model)


@torch.no_grad()
def materialize(model: nn.Module, source: nn.Module) -> None:
    model.to_empty(device="cpu")
    for param, value in zip(model.parameters(), source.parameters(), strict=True):
        param.copy_(distribute_tensor(value.detach(), param.device_mesh, param.placements))


def check_meta_before_the_optimizer(world: World) -> None:
    for name in ("mada-paper", "omada", "adamw"):
        alone, together = Net(), sharded_on_meta()
        one, other = ROWS[name](alone.parameters(), lr=5e-3), ROWS[name](together.parameters(), lr=5e-3)
        assert other.coefficients() == one.coefficients()
        materialize(together, alone)
        expected = train_alone(alone, one, STEPS)
        losses, _ = train_share(world, together, other, STEPS)
        assert losses == pytest.approx(expected, rel=0, abs=1e-12)
        assert_close_models(together, alone)
        assert_close_coefficients(other, one)
        assert_same_on_all_ranks(world, learned(other))

        resumed = sharded_on_meta()
        late = ROWS[name](resumed.parameters(), lr=5e-3)
        materialize(resumed, Net(seed=1))
        model_state, state = get_state_dict(together, other)
        set_state_dict(resumed, late, model_state_dict=model_state, optim_state_dict=state)
        for model, optimizer in ((together, other), (resumed, late)):
            train_share(world, model, optimizer, STEPS, first=STEPS)
        assert torch.equal(learned(late), learned(other))
        for a, b in zip(resumed.parameters(), together.parameters(), strict=True):
            assert torch.equal(whole(a.detach()), whole(b.detach()))
