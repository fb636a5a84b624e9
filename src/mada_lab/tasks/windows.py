"""What language models of every kind of token share: a GPT-2 that sees windows of one long row of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mada_lab.errors import require
from mada_lab.tasks.adaptation import ADAPTATIONS, check_installed
from mada_lab.tasks.base import Batch, TaskConfig
from mada_lab.tasks.initial import Initial

VALIDATION_BATCH = 64
VALIDATION_TOKENS = 16_384  # at once: the logits of a large vocabulary are what fills the memory

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class WindowsConfig(TaskConfig):
    """Model size and windows.

    Args:
        layers, heads, width: of the transformer; ``width`` must be a multiple of ``heads``.
        context: tokens that the model sees.
        batch: windows of ``context`` tokens in a batch.
        val_windows: windows of ``context`` tokens, evenly spread over the validation text, to validate on.
        dropout: share of embeddings, attention weights and outputs of layers that are left out, at random, in training.
        autocast: matrix products in bfloat16; None: on CUDA.
        init: folder of an earlier run of the same kind of task, finished or interrupted, whose weights the training
            begins with; sizes are the same as there, ``context`` is not longer. None: random weights.
        adapt: what is trained of the model: "all"; "head", a new linear head on features that stay; or "lora", adapters
            of rank 8 on all linear layers. The others than "all" need ``init``.
    """

    paths: ClassVar[tuple[str, ...]] = ("data", "init")
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    val_windows: int = 256
    dropout: float = 0.0
    autocast: bool | None = None
    init: str | None = None
    adapt: str = "all"

    def __post_init__(self) -> None:
        self._require_positive("layers", "heads", "width", "context", "batch", "val_windows")
        require(self.width % self.heads == 0, "width", self.width, f"a multiple of heads ({self.heads})")
        share = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        require(share, "dropout", self.dropout, "a number from 0 to below 1")
        require(self.adapt in ADAPTATIONS, "adapt", self.adapt, f"one of {', '.join(ADAPTATIONS)}")


class WindowsTask:
    """Predict the next token.

    Args:
        config: model size and windows.
        vocabulary_size: tokens that a model with random weights knows; all in the data are below it.
        train, validation: tokens, each in one row. They may be memory-mapped: only windows are read.
        initial: weights that models begin with; None: random ones.
    """

    def __init__(
        self,
        config: WindowsConfig,
        vocabulary_size: int,
        train: Tokens,
        validation: Tokens,
        initial: Initial | None = None,
    ) -> None:
        # Not a part of the configuration's own checks: one that was packed does not tell where its data lay.
        begun = config.adapt == "all" or initial is not None
        require(begun, "adapt", config.adapt, "all where there is no init, whose weights would stay as they are")
        check_installed(config.adapt)
        self.size, self.initial = config, initial
        self.vocabulary_size = vocabulary_size if initial is None else initial.vocabulary_size
        self.train, self.validation = train, validation
        if initial is not None:
            _check_fits(initial, config)
        self._val_starts = self.validation_starts(validation)

    def model(self, seed: int) -> nn.Module:
        """Return a GPT-2, with the weights of ``init`` whatever the seed, where there are any."""
        # Slow to import, and not needed to check a configuration.
        from transformers import GPT2Config, GPT2LMHeadModel

        size = self.size
        config = GPT2Config(
            vocab_size=self.vocabulary_size,
            n_positions=size.context if self.initial is None else self.initial.positions,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            # GPT-2's own activation, by one operation of torch instead of eight: a tenth of the step on a CPU.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=size.dropout,
            embd_pdrop=size.dropout,
            attn_pdrop=size.dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = GPT2LMHeadModel(config)
            if self.initial is not None:
                model.load_state_dict(self.initial.weights)
            return ADAPTATIONS[size.adapt](model)

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs and targets, each of shape (batch, context), at random places of the training text."""
        places = np.random.default_rng((seed, step)).integers(
            0, len(self.train) - self.size.context, size=self.size.batch
        )
        return windows(self.train, places, self.size.context)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats per token."""
        device = next(model.parameters()).device
        inputs, targets = (tensor.to(device) for tensor in batch)
        with self.precision(model):
            logits: Tensor = model(input_ids=inputs).logits
        # At least float32: a softmax over bfloat16 logits loses what distinguishes two optimizers.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.mean_loss(model, self.validation, self._val_starts)}

    def validation_starts(self, tokens: Tokens) -> Tensor:
        """Return where the windows to validate on begin, evenly spread over tokens."""
        last = len(tokens) - self.size.context - 1
        return torch.linspace(0, last, self.size.val_windows, dtype=torch.float64).long()

    def precision(self, model: nn.Module) -> torch.autocast:
        """Return the context in which the model computes."""
        device = next(model.parameters()).device.type
        wanted = self.size.autocast
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" if wanted is None else wanted)

    def describe_initial(self) -> dict[str, Any]:
        """Return a part of :meth:`Task.describe`."""
        return {"init": None if self.initial is None else self.initial.describe()}

    def mean_loss(self, model: nn.Module, tokens: Tokens, starts: Tensor) -> float:
        """Mean :meth:`loss` over the windows of ``context`` tokens that begin at ``starts``."""
        total = 0.0
        at_once = max(1, min(VALIDATION_BATCH, VALIDATION_TOKENS // self.size.context))
        for some in torch.split(starts, at_once):
            total += self.loss(model, windows(tokens, some.numpy(), self.size.context)).item() * len(some)
        return total / len(starts)


def _check_fits(initial: Initial, config: WindowsConfig) -> None:
    """Raise :class:`InputError` where the model of ``config`` cannot take the weights."""
    for name, size in initial.sizes.items():
        require(getattr(config, name) == size, name, getattr(config, name), f"{size}, as in init={initial.source}")
    longest = f"at most {initial.positions}, as in init={initial.source}"
    require(config.context <= initial.positions, "context", config.context, longest)


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], length: int) -> Batch:
    """Inputs and targets of shape (len(starts), length), int64: the targets are the inputs' next tokens.

    >>> windows(np.arange(10), np.array([0, 6]), 3)
    (tensor([[0, 1, 2],
            [6, 7, 8]]), tensor([[1, 2, 3],
            [7, 8, 9]]))
    """
    cut = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return cut[:, :-1], cut[:, 1:]
