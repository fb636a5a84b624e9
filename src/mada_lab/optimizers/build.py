"""An optimizer from its configuration, for a model; a configuration from a command line's text."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mada_optim
from mada_lab.optimizers.peers import MuonWithAdamW
from mada_lab.optimizers.registry import find
from mada_lab.run.config import OptimizerConfig
from mada_lab.tasks import InputError
from mada_optim.matrices.groups import by_layout, layouts_of

BETAS = (0.9, 0.99)


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """``config`` with the recipe's defaults in place of None, checked by constructing the optimizer once."""
    entry = find(config.name)
    resolved = dataclasses.replace(
        config,
        lr=entry.lr if config.lr is None else config.lr,
        betas=BETAS if config.betas is None and not entry.own_betas else config.betas,
        weight_decay=entry.weight_decay if config.weight_decay is None else config.weight_decay,
    )
    with torch.random.fork_rng(devices=[]):
        # The middle layer is a hidden matrix, without which nobody would check the options that concern matrices.
        build(resolved, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
    return resolved


def build(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer of a resolved configuration for a model.

    Weight decay acts on tensors of two and more dimensions: decaying biases and the gains of norms does harm.
    """
    constructor = find(config.name).make or mada_optim.load_optimizer(config.name)
    arguments = {**config.options, "lr": config.lr}
    if "state_dtype" in arguments:
        arguments["state_dtype"] = getattr(torch, str(arguments["state_dtype"]), arguments["state_dtype"])
    if config.betas is not None:
        arguments["betas"] = config.betas
    try:
        return constructor(_groups(config, model), **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {config.name}: {error}") from error
    except ModuleNotFoundError as error:
        raise InputError(f"optimizer {config.name} needs the package {error.name}: pip install {error.name}") from error


def _groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    decayed = [param for param in params if param.dim() >= 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    if find(config.name).make in (MuonWithAdamW, mada_optim.OMADA):
        layouts = layouts_of(model)
        parts = [part for group in groups for part in by_layout(group, layouts, rest_first=True)]
        groups = sorted(parts, key=lambda part: bool(part["matrices"]))
    return [group for group in groups if group["params"]]


def parse(spec: str) -> OptimizerConfig:
    """An optimizer from ``name`` or ``name:option=value:option=value``, as in ``mada:rho=0``.

    ``beta1`` and ``beta2`` go together and make up ``betas``.

    >>> parse("mada:rho=0:beta1=0.8:beta2=0.9:weight_decay=0.3")
    OptimizerConfig(name='mada', lr=None, betas=(0.8, 0.9), weight_decay=0.3, options={'rho': 0})

    Values are numbers, but for ``state_dtype``, the name of a dtype: ``mada:state_dtype=bfloat16``.
    """
    name, *settings = spec.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        option = option.replace("-", "_")
        if option in options:
            raise InputError(f"{option} is given twice in {spec!r}")
        if option == "betas":
            raise InputError(f"betas must be given as beta1=NUMBER:beta2=NUMBER, got {setting!r} in {spec!r}")
        if option == "state_dtype":
            options[option] = value
            continue
        try:
            options[option] = int(value) if value.strip("+-").isdecimal() else float(value)
        except ValueError:
            raise InputError(f"optimizer option must be name=number, got {setting!r} in {spec!r}") from None
    betas = [options.pop(beta) for beta in ("beta1", "beta2") if beta in options]
    if len(betas) == 1:
        raise InputError(f"beta1 and beta2 go together, got one of them in {spec!r}")
    return OptimizerConfig(name, betas=(betas[0], betas[1]) if betas else None, options=options)
