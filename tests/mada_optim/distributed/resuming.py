"""Checkpoints of several processes: saved on 2, resumed on 2 others, on 4, and on one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checks import assert_same_on_all_ranks, learned, sharded, train_alone, train_share, whole
from problems import Net
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from worlds import World

from mada_optim import MADA, OMADA, HypergradientOptimizer

CUT, STEPS = 5, 10
DIVIDED_COLUMNS = {"dim": 1, "parts": (1, 1)}


def three_groups(model: nn.Module) -> MADA:
    """Two groups and, between them, an empty one."""
    params = list(model.parameters())
    groups = [{"params": params[:3]}, {"params": []}, {"params": params[3:], "lr": 2e-2, "eps": 1e-6}]
    return MADA(groups, lr=5e-3, rho=0.4, gamma=0.7, hyper_warmup=1, hyper_momentum=0.5)


def load(folder: Path, model: nn.Module, optimizer: HypergradientOptimizer) -> None:
    """With all that torch.distributed.checkpoint does."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def result(model: nn.Module, optimizer: HypergradientOptimizer) -> dict[str, torch.Tensor]:
    return {name: whole(param.detach()) for name, param in model.named_parameters()} | {"learned": learned(optimizer)}


def check_save(world: World) -> None:
    model = sharded(Net())
    optimizer = three_groups(model)
    train_share(world, model, optimizer, CUT)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=world.folder / "dcp")
    train_share(world, model, optimizer, STEPS - CUT, first=CUT)
    final = result(model, optimizer)
    if world.rank == 0:
        torch.save(final, world.folder / "final.pt")


def check_resume_on_2(world: World) -> None:
    resume(world, exact=True)


def check_resume_on_4(world: World) -> None:
    resume(world, exact=False)


def resume(world: World, exact: bool) -> None:
    model = sharded(Net(seed=1))
    optimizer = three_groups(model)
    load(world.folder / "dcp", model, optimizer)
    train_share(world, model, optimizer, STEPS - CUT, first=CUT)
    assert_result(world.folder, model, optimizer, exact)


def check_full_state(world: World) -> None:
    """The other way of torch.distributed.checkpoint: whole tensors, on rank 0 alone."""
    model = sharded(Net())
    optimizer = three_groups(model)
    train_share(world, model, optimizer, CUT)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_state_dict(model, optimizer, options=options)
    other_model = sharded(Net(seed=1))
    other = three_groups(other_model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # Not set_state_dict: it would leave out the model where its state is empty, on the other ranks.
    set_model_state_dict(other_model, states[0], options=options)
    set_optimizer_state_dict(other_model, other, states[1], options=options)
    for m, o in ((model, optimizer), (other_model, other)):
        train_share(world, m, o, STEPS - CUT, first=CUT)
    torch.testing.assert_close(result(other_model, other), result(model, optimizer), rtol=0, atol=0)


def check_state_of_one_process(world: World) -> None:
    """The usual state_dict, whole on each rank, into shards."""
    model, spread = Net(), Net(seed=1)
    optimizer = three_groups(model)
    train_alone(model, optimizer, CUT)
    spread.load_state_dict(model.state_dict())
    other = three_groups(sharded(spread))
    other.load_state_dict(optimizer.state_dict())
    train_alone(model, optimizer, STEPS - CUT, first=CUT)
    train_share(world, spread, other, STEPS - CUT, first=CUT)
    torch.testing.assert_close(result(spread, other), result(model, optimizer), rtol=0, atol=1e-12)


def check_a_state_that_does_not_fit(world: World) -> None:
    """An error on each rank, and nothing has changed."""
    model = sharded(Net())
    optimizer = three_groups(model)
    train_share(world, model, optimizer, CUT)
    before = copy.deepcopy(result(model, optimizer))
    saved = optimizer.state_dict()
    saved["state"][6] = {**saved["state"][6], "exp_avg": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="exp_avg of shape"):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(result(model, optimizer), before, rtol=0, atol=0)
    assert whole(optimizer.state[model.out.bias]["exp_avg"]).shape == (3,)


def check_flat_state(world: World) -> None:
    """As for pipelines; torch takes no empty group there."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [sharded(Net(seed=seed)) for seed in (0, 1)]
    optimizers = []
    for model in models:
        params = list(model.parameters())
        optimizers.append(MADA([{"params": params[:3]}, {"params": params[3:], "lr": 2e-2}], lr=5e-3, hyper_warmup=1))
    train_share(world, models[0], optimizers[0], CUT)
    states = get_state_dict(models[0], optimizers[0], options=options)
    set_state_dict(models[1], optimizers[1], model_state_dict=states[0], optim_state_dict=states[1], options=options)
    for pair in zip(models, optimizers, strict=True):
        train_share(world, *pair, STEPS - CUT, first=CUT)
    found, expected = (result(*pair) for pair in zip(models, optimizers, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_bfloat16(world: World) -> None:
    """Buffers keep their float32 through torch.distributed.checkpoint."""
    models = [sharded(Net(torch.bfloat16, seed=seed)) for seed in (0, 1)]
    optimizers = [three_groups(model) for model in models]
    train_share(world, models[0], optimizers[0], CUT)
    before = [dict(state) for state in optimizers[0].state.values()]
    states = dict(zip(("model", "optimizer"), get_state_dict(models[0], optimizers[0]), strict=True))
    dcp.save(states, checkpoint_id=world.folder / "bfloat16")
    load(world.folder / "bfloat16", models[1], optimizers[1])
    after = [dict(state) for state in optimizers[1].state.values()]
    assert len(before) == len(after) == 7
    for one, other in zip(before, after, strict=True):
        assert one["exp_avg_sq"].dtype == torch.float32
        for name, tensor in one.items():
            assert other[name].dtype == tensor.dtype
            assert torch.equal(whole(other[name]), whole(tensor)), name


def rows_normalized(model: nn.Module) -> OMADA:
    """The hidden layer's weight is one matrix, (9, 6), and the embedding's two of them side by side, (11, 3) each."""
    hidden, tables = [model.hidden.weight], [model.embedding.weight]
    groups = [{"params": hidden, "matrices": True}, {"params": tables, "matrices": True, "split": DIVIDED_COLUMNS}]
    return OMADA(groups, lr=5e-3, scale=False, ortho=0.7, row_norm=0.3, hyper_lr={"row_norm": 0.1})


def check_rows_are_saved(world: World) -> None:
    """One number for each row, whole on each process, through torch.distributed.checkpoint; as in one process."""
    alone, models = Net(), [sharded(Net(seed=seed)) for seed in (0, 1)]
    expected, *optimizers = (rows_normalized(model) for model in (alone, *models))
    train_alone(alone, expected, STEPS)
    train_share(world, models[0], optimizers[0], CUT)
    states = dict(zip(("model", "optimizer"), get_state_dict(models[0], optimizers[0]), strict=True))
    dcp.save(states, checkpoint_id=world.folder / "rows")
    load(world.folder / "rows", models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        train_share(world, model, optimizer, STEPS - CUT, first=CUT)
        for weight, one, shape in (
            (model.hidden.weight, alone.hidden.weight, (9, 1)),
            (model.embedding.weight, alone.embedding.weight, (11, 2)),
        ):
            rows = optimizer.state[weight]["ortho_row_sq"]
            assert isinstance(rows, DTensor)
            assert rows.to_local().shape == shape
            assert_same_on_all_ranks(world, rows.to_local())
            torch.testing.assert_close(rows.to_local(), expected.state[one]["ortho_row_sq"], rtol=0, atol=1e-12)
            torch.testing.assert_close(whole(weight.detach()), one.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(*(result(*pair) for pair in zip(models, optimizers, strict=True)), rtol=0, atol=0)


def assert_result(folder: Path, model: nn.Module, optimizer: HypergradientOptimizer, exact: bool) -> None:
    expected = torch.load(folder / "final.pt", weights_only=True)
    torch.testing.assert_close(result(model, optimizer), expected, rtol=0, atol=0 if exact else 1e-12)
