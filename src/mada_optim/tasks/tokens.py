"""Language modelling in GPT-2's tokens, on a folder that ``mada tokens`` made: from 10 to 355 million parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mada_optim.tasks import Batch, InputError, require
from mada_optim.tasks.evaluation import Lambada, perplexity
from mada_optim.tasks.packing import read
from mada_optim.tasks.windows import WindowsConfig, WindowsTask

# Layers, heads, width.
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
MULTIPLE = 64  # of which the vocabulary is made one, for the speed of matrix products; no target is beyond the real one


@dataclass(frozen=True)
class TokensConfig(WindowsConfig):
    """Tokens, model size and batch. The defaults are GPT-2 124M with half a million tokens in a step.

    Args:
        data: folder that ``mada tokens`` made.
        layers, heads, width, context, batch, val_windows: see :class:`WindowsConfig`.
        size: layers, heads and width by a name of ``SIZES``; leave these out then.
        pretrained: published weights to begin with, by their name on the hub or the folder that holds them; layers,
            heads and width are theirs then. None: random weights.
        autocast: matrix products in bfloat16; None: on CUDA.
        wikitext: folder that ``mada tokens`` made, whose val.bin gives a perplexity at each validation.
        lambada: file of LAMBADA, plain text or JSON lines, which gives a perplexity and the accuracy of last words.
    """

    kind: ClassVar[str] = "tokens"
    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    batch: int = 480
    size: str | None = None
    pretrained: str | None = None
    autocast: bool | None = None
    wikitext: str | None = None
    lambada: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            require(self.size in SIZES, "size", self.size, f"one of {', '.join(SIZES)}")
            require(self.pretrained is None, "size", self.size, "left out with pretrained weights")
            given, known = (self.layers, self.heads, self.width), SIZES[self.size]
            alone = given in (known, (TokensConfig.layers, TokensConfig.heads, TokensConfig.width))
            require(alone, "size", self.size, "left out where layers, heads or width are given")
            for name, value in zip(("layers", "heads", "width"), known, strict=True):
                object.__setattr__(self, name, value)

    def build(self) -> TokensTask:
        return TokensTask(self)

    def resolved(self) -> Self:
        paths = {name: getattr(self, name) for name in ("data", "pretrained", "wikitext", "lambada")}
        # What is not there may be a name on the hub; if not, building the task will say so.
        there: dict[str, Any] = {
            name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()
        }
        return dataclasses.replace(self, **there)


class TokensTask(WindowsTask):
    """Predict the next of GPT-2's tokens."""

    def __init__(self, config: TokensConfig) -> None:
        self.config = config
        require(config.data is not None, "data", config.data, "a folder that 'mada tokens' made")
        self.packed = read(str(config.data))
        for part, tokens in (("train", self.packed.train), ("val", self.packed.validation)):
            enough = len(tokens) > config.context
            require(enough, f"data, {part}.bin,", f"{len(tokens)} in {config.data}", f"over {config.context} tokens")
        size = self.packed.meta["vocabulary"]
        self._published = None if config.pretrained is None else _published(config.pretrained, size, config.context)
        super().__init__(config, -(-size // MULTIPLE) * MULTIPLE, self.packed.train, self.packed.validation)
        self.wikitext = None if config.wikitext is None else read(config.wikitext, "wikitext")
        if self.wikitext is not None:
            same = self.wikitext.meta["tokenizer_sha256"] == self.packed.meta["tokenizer_sha256"]
            require(same, "wikitext", config.wikitext, "of the same tokenizer as data")
        self.lambada = None
        if config.lambada is not None:
            self.lambada = Lambada.read(config.lambada, self.packed.tokenizer(), config.context)

    def model(self, seed: int) -> nn.Module:
        if self._published is None:
            return super().model(seed)
        from transformers import GPT2LMHeadModel

        model: nn.Module = GPT2LMHeadModel.from_pretrained(
            self.config.pretrained, config=self._published, dtype=torch.float32
        )
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats per token."""
        with self._precision(model):
            return super().loss(model, batch)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        values = super().validate(model)
        if self.wikitext is not None:
            values["wikitext_perplexity"] = perplexity(self, model, self.wikitext.validation)
        if self.lambada is not None:
            with self._precision(model):
                values |= self.lambada.evaluate(model)
        return values

    def describe(self) -> dict[str, Any]:
        meta = self.packed.meta
        parts = {part: {name: meta[part][name] for name in ("tokens", "sha256")} for part in ("train", "val")}
        extras = {
            "wikitext": None if self.wikitext is None else self.wikitext.meta["val"]["sha256"],
            "lambada": None if self.lambada is None else self.lambada.sha256,
        }
        return {"task": "tokens", "source": meta["source"], "vocabulary": meta["vocabulary"], **parts, **extras}

    def _precision(self, model: nn.Module) -> torch.autocast:
        device = next(model.parameters()).device.type
        wanted = self.config.autocast
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" if wanted is None else wanted)


def _published(name: str, vocabulary: int, context: int) -> Any:
    """The configuration of published weights, without dropout, if they fit the data."""
    from transformers import AutoConfig

    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    try:
        config = AutoConfig.from_pretrained(name, use_cache=False, **none)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"pretrained must be weights of GPT-2, a folder or a name on the hub: {reason}") from error
    require(config.model_type == "gpt2", "pretrained", name, f"of the type gpt2 (it is {config.model_type})")
    require(config.vocab_size >= vocabulary, "pretrained", name, f"weights for {vocabulary} tokens or more")
    require(context <= config.n_positions, "context", context, f"at most {config.n_positions}, as in {name}")
    return config
