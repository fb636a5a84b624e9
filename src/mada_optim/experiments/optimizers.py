"""The optimizers that experiments know by name: ours, and torch's own as the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mada_optim
from mada_optim.experiments.config import OptimizerConfig
from mada_optim.tasks import InputError

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1

# The baseline must be what people use, not our reformulation of it, and as fast as it comes.
_TORCH: dict[str, Callable[..., Optimizer]] = {"adamw": torch.optim.AdamW, "amsgrad": torch.optim.AdamW}
_TORCH_OPTIONS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}, "amsgrad": {"fused": True, "amsgrad": True}}

# To these, (0.9, 0.99) would mean something else than to Adam.
_OWN_BETAS = ("adan", "lion")
_DESCRIPTIONS = {
    "adam": "Adam; adamw without weight decay",
    "adamw": "torch.optim.AdamW, fused: the baseline",
    "adan": "Adan: momentum of gradient differences",
    "amsgrad": "torch.optim.AdamW(amsgrad=True), fused",
    "avgrad": "AMSGrad with the average in place of the maximum",
    "hyperadam": "Adam that learns beta1 and beta2",
    "lion": "Lion: sign of a momentum (wants a 3 to 10 times smaller lr)",
    "mada": "learns all six coefficients, from Adam's point",
    "yogi": "Yogi: additive second moment",
}


def available() -> dict[str, str]:
    """Name and description of every optimizer that a run can use."""
    return {name: _DESCRIPTIONS.get(name, "") for name in sorted({*mada_optim.available_optimizers(), *_TORCH})}


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """``config`` with the recipe's defaults in place of None, checked by constructing the optimizer once."""
    if config.name not in available():
        raise InputError(f"optimizer must be one of {', '.join(available())}, got {config.name!r}")
    betas, decay = config.betas, config.weight_decay
    if betas is None and config.name not in _OWN_BETAS:
        betas = BETAS
    if decay is None:
        decay = 0.0 if config.name == "adam" else WEIGHT_DECAY
    resolved = dataclasses.replace(config, betas=betas, weight_decay=decay)
    build(resolved, nn.Linear(1, 1))
    return resolved


def build(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer of a resolved configuration for a model.

    Weight decay acts on tensors of two and more dimensions: decaying biases and the gains of norms does harm.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
    ]
    constructor = _TORCH.get(config.name) or mada_optim.load_optimizer(config.name)
    arguments = {"lr": config.lr, **_TORCH_OPTIONS.get(config.name, {}), **config.options}
    if "state_dtype" in arguments:
        arguments["state_dtype"] = getattr(torch, str(arguments["state_dtype"]), arguments["state_dtype"])
    if config.betas is not None:
        arguments["betas"] = config.betas
    try:
        return constructor(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {config.name}: {error}") from error


def parse(spec: str) -> OptimizerConfig:
    """An optimizer from ``name`` or ``name:option=value:option=value``, as in ``mada:rho=0``.

    ``beta1`` and ``beta2`` go together and make up ``betas``.

    >>> parse("mada:rho=0:beta1=0.8:beta2=0.9")
    OptimizerConfig(name='mada', lr=0.003, betas=(0.8, 0.9), weight_decay=None, options={'rho': 0.0})

    Values are numbers, but for ``state_dtype``, the name of a dtype: ``mada:state_dtype=bfloat16``.
    """
    name, *settings = spec.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        if option == "state_dtype":
            options[option] = value
            continue
        try:
            options[option.replace("-", "_")] = float(value)
        except ValueError:
            raise InputError(f"optimizer option must be name=number, got {setting!r} in {spec!r}") from None
    betas = [options.pop(beta) for beta in ("beta1", "beta2") if beta in options]
    if len(betas) == 1:
        raise InputError(f"beta1 and beta2 go together, got one of them in {spec!r}")
    return OptimizerConfig(name, betas=(betas[0], betas[1]) if betas else None, options=options)
