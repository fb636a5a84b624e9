"""What is trained of a GPT-2 that has weights already, by name. The rest of it stays as it is."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from mada_lab.errors import require

RANK = 8


def everything(model: nn.Module) -> nn.Module:
    """Return the model as it is."""
    return model


def new_head(model: nn.Module) -> nn.Module:
    """Return the model with a new linear head, which alone is trained: a linear probe of its features."""
    model.requires_grad_(False)
    old: Any = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features, bias=False)
    return model


def adapters(model: nn.Module) -> nn.Module:
    """Return the model with adapters on all linear layers, which alone are trained.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, as in peft, of rank 8 and scaled by 2.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = ["c_attn", "c_fc", "c_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers, fan_in_fan_out=True)
    return inject_adapter_in_model(config, model)


def check_installed(adapt: str) -> None:
    """Raise :class:`InputError` where a package is missing."""
    allowed = "another one: the package peft is missing (pip install peft)"
    require(adapt != "lora" or find_spec("peft") is not None, "adapt", adapt, allowed)


ADAPTATIONS = {"all": everything, "head": new_head, "lora": adapters}
