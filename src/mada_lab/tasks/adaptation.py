"""What is trained of a GPT-2 that has weights already, by name. The rest of it stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

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


ADAPTATIONS = {"all": everything, "head": new_head, "lora": adapters}
