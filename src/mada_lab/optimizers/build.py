"""From an optimizer's configuration to the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mada_optim
from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig, ResolvedOptimizer
from mada_lab.optimizers.registry import find
from mada_optim.matrices.groups import by_layout, layouts_of

BETAS = (0.9, 0.99)


def resolve_optimizer(config: OptimizerConfig) -> ResolvedOptimizer:
    """Put the recipe's defaults in place of None, and check all of it by constructing the optimizer once."""
    entry = find(config.name)
    resolved = ResolvedOptimizer(
        config.name,
        lr=entry.lr if config.lr is None else config.lr,
        betas=BETAS if config.betas is None and not entry.own_betas else config.betas,
        weight_decay=entry.weight_decay if config.weight_decay is None else config.weight_decay,
        options=config.options,
    )
    with torch.random.fork_rng(devices=[]):
        # The middle layer is a hidden matrix, without which nobody would check the options that concern matrices.
        build(resolved, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
    return resolved


def build(config: ResolvedOptimizer, model: nn.Module) -> Optimizer:
    """Return the optimizer for a model.

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


def _groups(config: ResolvedOptimizer, model: nn.Module) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    decayed = [param for param in params if param.dim() >= 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    if find(config.name).takes_matrices:
        layouts = layouts_of(model)
        parts = [part for group in groups for part in by_layout(group, layouts, rest_first=True)]
        groups = sorted(parts, key=lambda part: bool(part["matrices"]))
    return [group for group in groups if group["params"]]
