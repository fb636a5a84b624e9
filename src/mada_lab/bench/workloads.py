"""What the optimizers have to do: tensors to update, or a model to train."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from mada_lab.bench.contender import LR, Contender
from mada_lab.bench.routines import QUINTICS, singular_values
from mada_lab.errors import require
from mada_lab.tasks.language import LanguageConfig
from mada_optim import matrix_groups
from mada_optim.engine import group_step
from mada_optim.kernels import Executor, select
from mada_optim.kernels.triton import launch
from mada_optim.kernels.triton.multi_tensor import TritonExecutor


@dataclass(frozen=True)
class Running:
    """An optimizer at work: a function that takes one step, and the optimizer if it is one in torch's sense.

    ``singular_values`` says where it brings those of matrices, if this is all that it does.
    """

    step: Callable[[], Any]
    optimizer: Optimizer | None
    singular_values: Callable[[], tuple[float, float]] | None = None

    def state_words(self, numel: int) -> float | None:
        """float32 numbers of state for each of ``numel`` parameters."""
        if self.optimizer is None:
            return None
        parts = getattr(self.optimizer, "parts", [self.optimizer])
        tensors = [x for part in parts for x in tree_leaves(dict(part.state)) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors) / 4 / numel


class Workload(ABC):
    """Parameters, and what happens to them in a step.

    Args:
        device: where.

    Class attributes:
        baseline: name of the contender that the others are timed in turn with.
        repeats: how many steps are timed as one.
        quantile: which of the times of all rounds is shown; 0.5 is the median.
    """

    title: str
    params: Sequence[Tensor]
    baseline: ClassVar[str] = "AdamW, fused"
    repeats: ClassVar[int] = 1
    quantile: ClassVar[float] = 0.5

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(param.numel() for param in self.params)

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self, contender: Contender) -> Running | None:
        """An optimizer at work, or None where it does not fit."""
        if contender.make is None:
            return None
        optimizer = contender.make(self.groups())
        return Running(lambda: self.step(optimizer), optimizer)

    def clock(self) -> float:
        """Return the time, in seconds."""
        return time.perf_counter()

    def groups(self) -> list[Any]:
        """What an optimizer is made from: the parameters, or parameter groups."""
        return list(self.params)

    @abstractmethod
    def step(self, optimizer: Optimizer) -> None:
        """What is timed."""


class Tensors(Workload):
    """Optimizer steps alone, on tensors of given shapes with gradients that stay."""

    def __init__(self, device: str, title: str, shapes: Sequence[torch.Size | tuple[int, ...]]) -> None:
        super().__init__(device)
        self.title = title
        generator = torch.Generator(device).manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]
        for param in self.params:
            param.grad = 1e-2 * torch.randn(param.shape, generator=generator, device=device)

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()


class ManyTensors(Tensors):
    """Tensors so small that a step costs what is done for each of them, not for its elements.

    Args:
        device: where.
        title: what they are.
        groups: shapes of the tensors of each parameter group. The learning rate decays from group to group.
    """

    baseline = "AdamW, foreach"

    def __init__(self, device: str, title: str, groups: Sequence[Sequence[tuple[int, ...]]]) -> None:
        super().__init__(device, f"{title}; ratios to {self.baseline}", [shape for group in groups for shape in group])
        self._sizes = [len(group) for group in groups]

    def groups(self) -> list[Any]:
        params = iter(self.params)
        return [{"params": list(islice(params, size)), "lr": LR * 0.9**index} for index, size in enumerate(self._sizes)]


class HostTime(Tensors):
    """Steps of small tensors as the program takes them for a GPU: it prepares Triton's kernels and launches none.

    The time is that of the processor, which other programs do not take. They only add to it, so low times are shown.
    """

    repeats = 5
    quantile = 0.05

    def __init__(self, device: str, title: str, shapes: Sequence[tuple[int, ...]]) -> None:
        require(device == "cpu", "device", device, "cpu for workload k, which launches nothing")
        require(launch.is_available(), "workloads", "k", "without k where Triton is not installed")
        super().__init__(device, title, shapes)

    def clock(self) -> float:
        return time.thread_time()

    def start(self, contender: Contender) -> Running | None:
        running = super().start(contender)
        if running is None or contender.kind != "ours":
            return running
        return Running(partial(_without_launches, running.step), running.optimizer)


def _without_launches(step: Callable[[], None]) -> None:
    """Take a step with the kernels for a GPU, which are not launched."""
    names, launched = vars(group_step), launch.Kernel.launch
    selected = names["select_executor"]
    names["select_executor"], launch.Kernel.launch = _select_triton, _launch_nothing  # type: ignore[method-assign]
    try:
        step()
    finally:
        names["select_executor"], launch.Kernel.launch = selected, launched  # type: ignore[method-assign]


def _select_triton(*_: Any) -> Executor:
    return select.the(TritonExecutor)


def _launch_nothing(*_: Any, **__: Any) -> None:
    pass


class Matrices(Workload):
    """Orthogonalization alone. Rows of random matrices fall off by powers 0, 1/2, 1 and 2 in turn, as spectra do.

    Args:
        device: where.
        title: what they are.
        shapes: of the tensors, each a matrix or a stack of matrices.
    """

    baseline = QUINTICS

    def __init__(self, device: str, title: str, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(device)
        self.title = f"{title}; ratios to {self.baseline}"
        generator = torch.Generator(device).manual_seed(0)
        matrices: list[Tensor] = []
        for index, shape in enumerate(shapes):
            rows = torch.arange(1.0, shape[-2] + 1, device=device)[:, None]
            fall = rows ** -(0.0, 0.5, 1.0, 2.0)[index % 4]
            matrices.append(torch.randn(shape, generator=generator, device=device) * fall)
        self.params = matrices

    def start(self, contender: Contender) -> Running | None:
        routine = contender.routine
        if routine is None:
            return None
        return Running(lambda: routine(self.params), None, lambda: singular_values(self.params, routine(self.params)))

    def step(self, optimizer: Optimizer) -> None:
        raise NotImplementedError


class Training(Workload):
    """Whole training steps of a GPT: zero_grad, forward, backward, step."""

    def __init__(self, device: str, config: LanguageConfig) -> None:
        super().__init__(device)
        self._task = config.build()
        self._model = self.fresh_model(tied=True)
        self.params = list(self._model.parameters())
        tokens = config.batch * config.context
        self.title = f"training step of a GPT of {self.numel / 1e6:.1f} M, {tokens} tokens"
        self._batch = self._task.batch(seed=0, step=0)

    def start(self, contender: Contender) -> Running | None:
        return super().start(contender) if contender.start is None else Running(contender.start(self), None)

    def step(self, optimizer: Optimizer) -> None:
        self._model.zero_grad()
        torch.autograd.backward(self.loss(self._model))
        optimizer.step()

    def fresh_model(self, tied: bool) -> nn.Module:
        """A model of its own, whose input and output embeddings are one tensor or two."""
        model = self._task.model(seed=0)
        if not tied:
            model.lm_head = copy.deepcopy(model.lm_head)
        return model.to(self.device)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a model, always on the same batch."""
        return self._task.loss(model, self._batch)


class MarkedTraining(Training):
    """Training steps whose optimizers are told which parameters are matrices."""

    def groups(self) -> list[Any]:
        return [{**group, "params": [param for _, param in group["params"]]} for group in matrix_groups(self._model)]


def hidden_shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """Return the shapes of GPT-2's hidden matrices: q, k, v and their projection; the two of the perceptron."""
    return [*[(width, width)] * 4 * layers, *[(4 * width, width)] * layers, *[(width, 4 * width)] * layers]


def gpt2_shapes() -> list[torch.Size]:
    """Return the shapes of the 148 tensors of GPT-2 with 124 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return [param.shape for param in GPT2LMHeadModel(GPT2Config()).parameters()]


# By the letter under which they are asked for.
WORKLOADS: dict[str, Callable[[str], Workload]] = {
    "a": lambda device: Tensors(device, "one tensor of 20 M", [(4000, 5000)]),
    "b": lambda device: Tensors(device, "the 148 tensors of GPT-2 124M", gpt2_shapes()),
    "c": lambda device: Training(
        device, LanguageConfig(layers=6, heads=6, width=384, context=256, batch=1 if device == "cpu" else 64)
    ),
    "d": lambda device: ManyTensors(device, "240 tensors of 64 x 64", [[(64, 64)] * 240]),
    "e": lambda device: ManyTensors(device, "10,000 tensors of 8", [[(8,)] * 10_000]),
    # A group of matrices and one of vectors for each layer, as where weight decay and learning rate are layer-wise.
    "f": lambda device: ManyTensors(device, "30 layers in 60 groups", [[(64, 64)] * 4, [(64,)] * 6] * 30),
    "g": lambda device: Matrices(device, "4 layers of GPT-2, width 256", hidden_shapes(4, 256)),
    "h": lambda device: Matrices(device, "a layer of GPT-2, width 768", hidden_shapes(1, 768)),
    "i": lambda device: Matrices(device, "4 layers of 8 experts, width 256", [(8, 1024, 256), (8, 256, 1024)] * 4),
    "j": lambda device: MarkedTraining(device, LanguageConfig()),
    "k": lambda device: HostTime(device, "the program's time for 148 tensors, nothing launched", [(8, 8), (8,)] * 74),
}
