"""A whole training step of GPT-2 124M in bfloat16 autocast, 98,304 tokens: MADA's and AdamW's in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from gpu.device import Setting
from gpu.optimizers import Optimizer
from gpu.record import Record
from mada_optim import MADA, load_optimizer

BAR = 1.01
ROUNDS = 6
WARM = 3  # steps in which all is compiled


def run(setting: Setting, record: Record) -> None:
    device, batch, micro, tokens = setting.device, 96, 32, 1024
    if setting.small:
        batch, micro, tokens = 2, 1, 8
    with record.check("GPT-2"):
        model = gpt2(setting)
        x = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
        x = x.to(device.name)

    def step(optimizer: torch.optim.Optimizer) -> float:
        began = device.now()
        optimizer.zero_grad()
        for part in x.split(micro):
            with torch.autocast(device.name, torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss
            (loss * (micro / batch)).backward()
        optimizer.step()
        device.synchronize()
        return device.now() - began

    makers: dict[str, Optimizer] = {
        "MADA, everything": partial(load_optimizer("mada-paper"), hyper_warmup=0),
        "MADA, nothing learned": partial(MADA, hyper_lr=0.0),
    }
    for name, make in makers.items():
        with record.check(name) as values:
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            values |= compare(step, make(model.parameters(), lr=1e-5), adamw, 1 if setting.small else ROUNDS)
            values["tokens"] = batch * tokens
            record.bar(f"{name}, whole training step", values["by AdamW's"], BAR)


def compare(
    step: Callable[[Any], float], optimizer: torch.optim.Optimizer, adamw: torch.optim.Optimizer, rounds: int
) -> dict[str, Any]:
    """Time steps of two optimizers of one model in turn."""
    for _ in range(WARM):
        step(optimizer)
    step(adamw)
    pairs = [(step(optimizer), step(adamw)) for _ in range(rounds)]
    ours, theirs = (median(each) for each in zip(*pairs, strict=True))
    return {"ms": 1e3 * ours, "AdamW's ms": 1e3 * theirs, "by AdamW's": median(one / other for one, other in pairs)}


def gpt2(setting: Setting) -> nn.Module:
    """Return GPT-2 124M with random weights, or a tiny one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 50, "n_positions": 16} if setting.small else {}
    with torch.device(setting.device.name):
        model: nn.Module = GPT2LMHeadModel(GPT2Config(use_cache=False, bos_token_id=None, eos_token_id=None, **sizes))
    return model
