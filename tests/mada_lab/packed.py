"""Packed tokens small enough for tests, by a tokenizer of their own in the files that GPT-2's has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mada_lab.tasks.corpus import Corpus
from mada_lab.tasks.language import embedded_text
from mada_lab.tasks.packing import END, pack
from mada_lab.tasks.tokens import TokensConfig


def make_tokenizer(folder: Path) -> Tokenizer:
    """300 tokens, in vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([embedded_text()[:50_000]], trainer)
    folder.mkdir()
    tokenizer.model.save(str(folder))
    assert {path.name for path in folder.iterdir()} == {"vocab.json", "merges.txt"}
    return tokenizer


def make_packed(folder: Path) -> Path:
    """20,000 characters of Python's language reference; the tokenizer is beside them."""
    make_tokenizer(folder / "bpe")
    (folder / "text.txt").write_text(embedded_text()[:20_000], encoding="utf-8")
    pack(Corpus((str(folder / "text.txt"),)), folder / "packed", str(folder / "bpe"))
    return folder / "packed"


def tiny_tokens(folder: Path, **changes: Any) -> TokensConfig:
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 8, "val_windows": 8}
    return TokensConfig(**{"data": str(folder), **sizes, **changes})
