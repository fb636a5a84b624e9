"""accelerate's FSDP2 on the CPU."""

from __future__ import annotations

import os

import pytest
from checks import STEPS, assert_close_models, assert_same_on_all_ranks, learned, train_alone
from problems import Net, batch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from worlds import World

from mada_optim import MADA
from mada_optim.integrations import unwrap


def check_accelerate_fsdp2(world: World) -> None:
    """What ``prepare`` does: it cuts the model up and puts the parts in the place of the optimizer's parameters.

    accelerate itself takes FSDP for accelerators only, so it is told after it has looked at the machine.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # looked for, not used: the processes have met
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    alone, model = Net(), Net()
    one = MADA(alone.parameters(), lr=5e-3, hyper_warmup=2, rho=0.5)
    expected = train_alone(alone, one)
    model, wrapped = accelerator.prepare(model, MADA(model.parameters(), lr=5e-3, hyper_warmup=2, rho=0.5))
    optimizer = unwrap(wrapped)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    losses = []
    for step in range(STEPS):
        x, y = (part.chunk(world.size)[world.rank] for part in batch(step))
        wrapped.zero_grad()
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        wrapped.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)
    assert_close_models(model, alone)
    assert optimizer.coefficients() == pytest.approx(one.coefficients(), rel=0, abs=1e-12)
    assert_same_on_all_ranks(world, learned(optimizer))
