"""What language models are measured by beside their loss: perplexity on a text, and the last words of LAMBADA."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mada_lab.errors import InputError, require
from mada_lab.tasks.windows import VALIDATION_TOKENS, Tokens, WindowsTask

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def perplexity(task: WindowsTask, model: nn.Module, tokens: Tokens) -> float:
    """exp of the mean loss per token, over windows of the task's context that lie side by side.

    The first token has nothing before it and is not counted, nor are those after the last whole window.
    """
    starts = torch.arange(0, len(tokens) - task.size.context, task.size.context)
    return _exp(task.mean_loss(model, tokens, starts))


@dataclass(frozen=True)
class Lambada:
    """Passages, each with how many tokens at its end are its last word; the longest first."""

    passages: list[tuple[list[int], int]]
    sha256: str

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer, context: int) -> Self:
        """Read a file with one passage a line, plain or as the "text" of a JSON object.

        The model sees as much of the end of a passage as its context holds.
        """
        try:
            content = Path(path).read_bytes()
            lines = [line for line in content.decode("utf-8").split("\n") if line.strip()]
            texts = [(json.loads(line)["text"] if line.startswith("{") else line).strip() for line in lines]
            cuts = [text.rindex(" ") for text in texts]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"lambada must be a file with passages of several words, got {path!r}: {error}") from None
        require(bool(texts), "lambada", path, "a file with at least one passage")
        both = list(zip(texts, cuts, strict=True))
        starts = tokenizer.encode_batch_fast([text[:cut] for text, cut in both], add_special_tokens=False)
        ends = tokenizer.encode_batch_fast([text[cut:] for text, cut in both], add_special_tokens=False)
        passages = []
        for start, end in zip(starts, ends, strict=True):
            # One more than the model sees: nothing comes after the last token.
            passages.append(((start.ids + end.ids)[-context - 1 :], min(len(end.ids), context)))
        passages.sort(key=lambda passage: -len(passage[0]))
        return cls(passages, hashlib.sha256(content).hexdigest())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of the last words, and the share of those that the model would have said, token by token."""
        total, right = 0.0, 0
        at_once = max(1, VALIDATION_TOKENS // len(self.passages[0][0]))
        for begin in range(0, len(self.passages), at_once):
            losses, said = _last_words(model, self.passages[begin : begin + at_once])
            total += losses.sum().item()
            right += int(said.sum().item())
        count = len(self.passages)
        return {"lambada_perplexity": _exp(total / count), "lambada_accuracy": right / count}


def _last_words(model: nn.Module, passages: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Return minus the log-probability of each passage's last word, and whether each token of it is the likeliest."""
    device = next(model.parameters()).device
    longest = max(len(tokens) for tokens, _ in passages)
    # Whatever fills a passage up comes after it, where a causal model does not look.
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in passages], device=device)
    places = [
        (row, column)
        for row, (tokens, last) in enumerate(passages)
        for column in range(len(tokens) - last - 1, len(tokens) - 1)
    ]
    rows, columns = torch.tensor(places, device=device).T
    # Logits only where they are needed: over all places they are the largest tensor by far.
    hidden = model.transformer(input_ids=padded[:, :-1]).last_hidden_state  # type: ignore[operator]
    logits = model.lm_head(hidden[rows, columns])  # type: ignore[operator]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = padded[rows, columns + 1]
    losses = F.cross_entropy(logits, targets, reduction="none")
    wrong = (logits.argmax(-1) != targets).to(losses.dtype)
    zeros = losses.new_zeros(len(passages))
    return zeros.index_add(0, rows, losses), zeros.index_add(0, rows, wrong) == 0


def _exp(value: float) -> float:
    """exp that overflows to infinity, as after a run that diverged."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
