"""Language modelling in GPT-2's tokens, on a folder that ``mada tokens`` made: from 10 to 355 million parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mada_lab.errors import require
from mada_lab.tasks.evaluation import Lambada, perplexity
from mada_lab.tasks.initial import Initial, from_run, is_run, published
from mada_lab.tasks.packing import Packed, read
from mada_lab.tasks.windows import WindowsConfig, WindowsTask

# Layers, heads, width.
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
MULTIPLE = 64  # of which the vocabulary is made one, for the speed of matrix products; no target is beyond the real one


@dataclass(frozen=True)
class TokensConfig(WindowsConfig):
    """Tokens, model size and batch. The defaults are GPT-2 124M with half a million tokens in a step.

    Args:
        data: folder that ``mada tokens`` made.
        layers, heads, width, context, batch, val_windows, dropout, autocast: see :class:`WindowsConfig`.
        init: see there; or published weights, in a folder that holds them or by their name on the hub.
        size: layers, heads and width by a name of ``SIZES``; leave these out then.
        wikitext: folder that ``mada tokens`` made, whose val.bin gives a perplexity at each validation.
        lambada: file of LAMBADA, plain text or JSON lines, which gives a perplexity and the accuracy of last words.
    """

    kind: ClassVar[str] = "tokens"
    paths: ClassVar[tuple[str, ...]] = ("data", "init", "wikitext", "lambada")
    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    batch: int = 480
    size: str | None = None
    wikitext: str | None = None
    lambada: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            require(self.size in SIZES, "size", self.size, f"one of {', '.join(SIZES)}")
            sizes, named = (self.layers, self.heads, self.width), SIZES[self.size]
            alone = sizes in (named, (TokensConfig.layers, TokensConfig.heads, TokensConfig.width))
            require(alone, "size", self.size, "left out where layers, heads or width are given")
            for name, value in zip(("layers", "heads", "width"), named, strict=True):
                object.__setattr__(self, name, value)

    def build(self) -> TokensTask:
        return TokensTask(self)


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
        initial = None if config.init is None else _initial(config.init, self.packed)
        super().__init__(config, -(-size // MULTIPLE) * MULTIPLE, self.packed.train, self.packed.validation, initial)
        self.wikitext = None if config.wikitext is None else read(config.wikitext, "wikitext")
        if self.wikitext is not None:
            same = self.wikitext.meta["tokenizer_sha256"] == self.packed.meta["tokenizer_sha256"]
            require(same, "wikitext", config.wikitext, "of the same tokenizer as data")
            count = len(self.wikitext.validation)
            enough = count > config.context
            require(enough, "wikitext, val.bin,", f"{count} in {config.wikitext}", f"over {config.context} tokens")
        self.lambada = None
        if config.lambada is not None:
            self.lambada = Lambada.read(config.lambada, self.packed.tokenizer(), config.context)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        values = super().validate(model)
        if self.wikitext is not None:
            values["wikitext_perplexity"] = perplexity(self, model, self.wikitext.validation)
        if self.lambada is not None:
            with self.precision(model):
                values |= self.lambada.evaluate(model)
        return values

    def describe(self) -> dict[str, Any]:
        meta = self.packed.meta
        parts = {part: {name: meta[part][name] for name in ("tokens", "sha256")} for part in ("train", "val")}
        extras = {
            "wikitext": None if self.wikitext is None else self.wikitext.meta["val"]["sha256"],
            "lambada": None if self.lambada is None else self.lambada.sha256,
        }
        known = {"vocabulary": meta["vocabulary"], "tokenizer": meta["tokenizer_sha256"]}
        return {"task": "tokens", "source": meta["source"], **known, **parts, **extras, **self.describe_initial()}


def _initial(init: str, packed: Packed) -> Initial:
    """Weights that know the tokens of the data."""
    initial = from_run(init, TokensConfig.kind) if is_run(init) else published(init)
    if initial.data:
        same = initial.data.get("tokenizer") == packed.meta["tokenizer_sha256"]
        require(same, "init", init, "a run on tokens of the same tokenizer as data")
    size = packed.meta["vocabulary"]
    require(initial.vocabulary_size >= size, "init", init, f"weights for {size} tokens or more")
    return initial
