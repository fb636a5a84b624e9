"""Weights that the training of a language model begins with: those of an earlier run, or published ones of GPT-2."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mada_lab.errors import InputError, require
from mada_lab.files import CHECKPOINT, CONFIG, RESULT, read_checkpoint, read_json

# In these, published weights must be as our models are.
_PLAIN = (
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Initial:
    """Weights of a GPT-2, on the CPU.

    Args:
        source: where they were found.
        weights: by the names that transformers gives them.
        heads: the one size that weights do not show.
        data: what the earlier run says of its data; empty where they are published ones.
    """

    source: str
    weights: Mapping[str, Tensor]
    heads: int
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int:
        return len(self.weights["transformer.wte.weight"])

    @property
    def positions(self) -> int:
        """The longest context."""
        return len(self.weights["transformer.wpe.weight"])

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # numpy does not know bfloat16.
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must have to take the weights, by the names of a task's fields."""
        layers = {name.split(".")[2] for name in self.weights if name.startswith("transformer.h.")}
        width = self.weights["transformer.wte.weight"].shape[1]
        return {"layers": len(layers), "heads": self.heads, "width": width}

    def describe(self) -> dict[str, Any]:
        return {"source": Path(self.source).name, "sha256": self.sha256}


def is_run(folder: str) -> bool:
    """Whether it is the folder of a run; weights in transformers' format have another config.json."""
    path = Path(folder) / CONFIG
    return path.is_file() and {"config", "data"} <= read_json(path).keys()


def from_run(folder: str, kind: str) -> Initial:
    """The weights that a run of a language model stored last.

    Args:
        folder: of the run, which may have been interrupted.
        kind: of its task.
    """

    def check(condition: bool, reason: str) -> None:
        require(condition, "init", folder, f"the folder of a run of the task {kind} ({reason})")

    path = Path(folder)
    check(is_run(folder), f"there is no {CONFIG} of a run")
    stored = read_json(path / CONFIG)
    stored_kind = stored["config"]["task"].get("kind")
    check(stored_kind == kind, f"it is of the task {stored_kind}")
    adapted = stored["config"]["task"].get("adapt", "all")
    check(adapted == "all", f"adapt={adapted} trained a part of its model, so its weights have other names")
    over = read_json(path / RESULT)["status"] if (path / RESULT).exists() else None
    check(over != "diverged", "it diverged")
    check((path / CHECKPOINT).exists(), f"there is no {CHECKPOINT} yet")
    try:
        state = read_checkpoint(path / CHECKPOINT)
    except ValueError as error:
        check(False, f"its {CHECKPOINT} cannot be read: {error}")
    # Schedule-free optimizers store the point where they take gradients. What they validate is an average.
    # Whatever else an optimizer stores, only those have such groups.
    averaged = any(group.get("train_mode") for group in state["optimizer"].get("param_groups", ()))
    check(not averaged, "it is schedule-free, and stores other weights than it validates")
    return Initial(folder, state["model"], stored["config"]["task"]["heads"], stored["data"])


def published(name: str) -> Initial:
    """Weights in transformers' format: a name on the hub, or a folder."""
    # Slow to import, and not needed to check a configuration.
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

    with _reading(name):
        config = AutoConfig.from_pretrained(name)
    require(config.model_type == "gpt2", "init", name, f"of the type gpt2 (it is {config.model_type})")
    plain = {option: getattr(GPT2Config(), option) for option in _PLAIN} | {"n_inner": 4 * config.n_embd}
    for option, value in plain.items():
        published_value = getattr(config, option)
        same = published_value == value or (option, published_value) == ("n_inner", None)
        require(same, f"{option} of init={name}", published_value, f"{value}, as in GPT-2")
    with _reading(name):
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    require(not missing, "init", name, f"all weights of a GPT-2 (it lacks {', '.join(missing[:3])})")
    return Initial(name, model.state_dict(), config.n_head)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        allowed = "the folder of a run, or weights of GPT-2, in a folder or by a name on the hub"
        raise InputError(f"init must be {allowed}, got {name!r}: {reason}") from error
