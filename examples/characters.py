"""Data and model of the examples: predict the next character of a text."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn


class Characters(torch.utils.data.Dataset):
    """Windows of a text, as inputs and the characters that follow them. Without a path: Python's language reference."""

    def __init__(self, path: Path | None = None, context: int = 64) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics)) if path is None else path.read_text("utf-8")
        self.vocabulary = sorted(set(text))
        codes = {character: code for code, character in enumerate(self.vocabulary)}
        tokens = torch.tensor([codes[character] for character in text])
        self.windows = tokens.unfold(0, context + 1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.windows[index, :-1], self.windows[index, 1:]


class Model(nn.Module):
    """A small recurrent language model, whose input and output share their embedding."""

    def __init__(self, vocabulary: int, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per character."""
        hidden, _ = self.recurrent(self.embedding(inputs))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())
