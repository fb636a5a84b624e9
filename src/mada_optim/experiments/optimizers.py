"""The optimizers that experiments know by name: ours, torch's as the baseline, and what else people use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mada_optim
from mada_optim.experiments.config import OptimizerConfig
from mada_optim.experiments.peers import MuonWithAdamW, prodigy, schedule_free_adamw
from mada_optim.experiments.variants import MaximumMADA, ZeroedGradientMADA
from mada_optim.matrices import matrix_parameters
from mada_optim.tasks import InputError

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Entry:
    """What experiments know of an optimizer.

    Args:
        description: for people.
        make: constructor; None: ``mada_optim.load_optimizer`` of the name.
        own_betas: (0.9, 0.99) would mean something else to it than to Adam.
        weight_decay: where the user gives none.
        final_lr: share of the learning rate at the end of a run, where the user gives none.
    """

    description: str
    make: Callable[..., Optimizer] | None = None
    own_betas: bool = False
    weight_decay: float = WEIGHT_DECAY
    final_lr: float = 0.1


# The baseline must be what people use, not our reformulation of it, and as fast as it comes.
ENTRIES: dict[str, Entry] = {
    "adam": Entry("Adam; adamw without weight decay", weight_decay=0.0),
    "adamw": Entry("torch.optim.AdamW, fused: the baseline", partial(torch.optim.AdamW, fused=True)),
    "adan": Entry("Adan: momentum of gradient differences", own_betas=True),
    "amsgrad": Entry("torch.optim.AdamW(amsgrad=True), fused", partial(torch.optim.AdamW, fused=True, amsgrad=True)),
    "avgrad": Entry("AMSGrad with the average in place of the maximum"),
    "hyperadam": Entry("Adam that learns beta1 and beta2"),
    "lion": Entry("Lion: sign of a momentum (wants a 3 to 10 times smaller lr)", own_betas=True),
    "mada": Entry("learns all coefficients but beta2, from Adam's point"),
    "mada-maximum": Entry("MADA with AMSGrad's maximum instead of AVGrad's average", MaximumMADA),
    "mada-paper": Entry("learns all six, with the authors' step sizes"),
    "mada-zeroed": Entry("MADA with the kept gradient zeroed, as the authors' code does", ZeroedGradientMADA),
    "muon": Entry("torch.optim.Muon for hidden matrices, torch's AdamW for the rest", MuonWithAdamW),
    "omada": Entry("OMADA: learns also how much of Muon, and a factor of lr", mada_optim.OMADA),
    "prodigy": Entry("Prodigy (prodigyopt): finds its step size, which lr multiplies; its authors advise 1", prodigy),
    "schedulefree": Entry("schedule-free AdamW (schedulefree), lr constant", schedule_free_adamw, final_lr=1.0),
    "yogi": Entry("Yogi: additive second moment"),
}


def available() -> dict[str, str]:
    """Name and description of every optimizer that a run can use."""
    return {name: entry.description for name, entry in ENTRIES.items()}


def find(name: str) -> Entry:
    """What is known of an optimizer. Raises :class:`InputError` where that is nothing."""
    if name not in ENTRIES:
        raise InputError(f"optimizer must be one of {', '.join(ENTRIES)}, got {name!r}")
    return ENTRIES[name]


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """``config`` with the recipe's defaults in place of None, checked by constructing the optimizer once."""
    entry, betas, decay = find(config.name), config.betas, config.weight_decay
    if betas is None and not entry.own_betas:
        betas = BETAS
    resolved = dataclasses.replace(config, betas=betas, weight_decay=entry.weight_decay if decay is None else decay)
    with torch.random.fork_rng(devices=[]):
        build(resolved, nn.Linear(1, 1))
    return resolved


def build(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer of a resolved configuration for a model.

    Weight decay acts on tensors of two and more dimensions: decaying biases and the gains of norms does harm.
    """
    constructor = find(config.name).make or mada_optim.load_optimizer(config.name)
    arguments = {"lr": config.lr, **config.options}
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
        hidden = set(matrix_parameters(model))
        groups[0]["params"] = [param for param in decayed if param not in hidden]
        matrices = [param for param in decayed if param in hidden]
        groups = [{**group, "matrices": False} for group in groups]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "matrices": True})
    return [group for group in groups if group["params"]]


def parse(spec: str) -> OptimizerConfig:
    """An optimizer from ``name`` or ``name:option=value:option=value``, as in ``mada:rho=0``.

    ``beta1`` and ``beta2`` go together and make up ``betas``.

    >>> parse("mada:rho=0:beta1=0.8:beta2=0.9")
    OptimizerConfig(name='mada', lr=0.003, betas=(0.8, 0.9), weight_decay=None, options={'rho': 0})

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
            options[option.replace("-", "_")] = int(value) if value.strip("+-").isdecimal() else float(value)
        except ValueError:
            raise InputError(f"optimizer option must be name=number, got {setting!r} in {spec!r}") from None
    betas = [options.pop(beta) for beta in ("beta1", "beta2") if beta in options]
    if len(betas) == 1:
        raise InputError(f"beta1 and beta2 go together, got one of them in {spec!r}")
    return OptimizerConfig(name, betas=(betas[0], betas[1]) if betas else None, options=options)
