"""Character-level language modelling: a GPT-2 with random weights on any text.

Without a file, the text is Python's own language reference, which the standard library carries
(``pydoc_data.topics``, about 465,000 characters). It differs a little between Python versions, which is why a run
records the version and a hash of the text.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mada_optim.tasks import Batch, InputError, TaskConfig, require

TRAIN_SHARE = 0.9
VALIDATION_BATCH = 64


@dataclass(frozen=True)
class LanguageConfig(TaskConfig):
    """Text, model size and batch. The defaults are nanoGPT's recipe for the CPU: 0.8 million parameters.

    Args:
        data: path of a UTF-8 text file; None: the language reference of Python.
        layers, heads, width: of the transformer; ``width`` must be a multiple of ``heads``.
        context: characters that the model sees.
        batch: windows of ``context`` characters in a batch.
        val_windows: windows of ``context`` characters, evenly spread over the validation text, to validate on.
    """

    kind: ClassVar[str] = "language"
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    val_windows: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context", "batch", "val_windows"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a positive integer")
        require(self.width % self.heads == 0, "width", self.width, f"a multiple of heads ({self.heads})")

    def build(self) -> LanguageTask:
        return LanguageTask(self)


class LanguageTask:
    """Predict the next character. The vocabulary is every character of the text; the last tenth is for validation."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.text = embedded_text() if config.data is None else read_text(config.data)
        self.vocabulary = sorted(set(self.text))
        codes = {character: code for code, character in enumerate(self.vocabulary)}
        tokens = torch.tensor([codes[character] for character in self.text], dtype=torch.long)
        self.train, self.validation = tokens.tensor_split([int(TRAIN_SHARE * len(tokens))])
        if len(self.validation) <= config.context:
            raise InputError(
                f"data must have more than {10 * (config.context + 1)} characters for context={config.context}, "
                f"got {len(tokens)} in {config.data}"
            )
        last = len(self.validation) - config.context - 1
        self._val_starts = torch.linspace(0, last, config.val_windows, dtype=torch.float64).long()

    def model(self, seed: int) -> nn.Module:
        # Slow to import, and not needed to check a configuration.
        from transformers import GPT2Config, GPT2LMHeadModel

        size = self.config
        config = GPT2Config(
            vocab_size=len(self.vocabulary),
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = GPT2LMHeadModel(config)
        return model

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs and targets, each of shape (batch, context), at random places of the training text."""
        places = np.random.default_rng((seed, step)).integers(
            0, len(self.train) - self.config.context, size=self.config.batch
        )
        return self._windows(self.train, torch.from_numpy(places))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats per character."""
        device = next(model.parameters()).device
        inputs, targets = (tensor.to(device) for tensor in batch)
        logits: Tensor = model(input_ids=inputs).logits
        # At least float32: a softmax over bfloat16 logits loses what distinguishes two optimizers.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        total = 0.0
        for starts in torch.split(self._val_starts, VALIDATION_BATCH):
            total += self.loss(model, self._windows(self.validation, starts)).item() * len(starts)
        return {"loss": total / len(self._val_starts)}

    def describe(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "task": "language",
            "source": f"pydoc_data.topics of Python {platform.python_version()}" if data is None else Path(data).name,
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "characters": len(self.text),
            "vocabulary": len(self.vocabulary),
        }

    def _windows(self, tokens: Tensor, starts: Tensor) -> Batch:
        windows = tokens[starts[:, None] + torch.arange(self.config.context + 1)]
        return windows[:, :-1], windows[:, 1:]


def embedded_text() -> str:
    """The topics of Python's language reference, sorted by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    try:
        # Line ends as they are: the text's hash must not depend on the platform.
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"data must be the path of a text file, got {path!r}, which does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"data must be a UTF-8 text file, got {path!r}, whose byte {error.start} is not UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"data must be a readable text file, got {path!r}: {error.strerror}") from None
    require(bool(text), "data", path, "a text file that is not empty")
    return text
