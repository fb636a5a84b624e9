"""Steps in a captured graph, of all parameters at once, in Triton's interpreter; see benchmarks/gpu_check.py."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import FLOAT32
from recorded import Graph, stand_for_cuda
from test_capturable import NoTransfer
from test_many_tensors import EVERYTHING
from test_multi_tensor import Unknown, _compile_nothing, launches, pytestmark  # noqa: F401
from torch import Tensor, nn

from mada_optim import MADA, Family, HypergradientOptimizer, MADAFamily
from mada_optim.engine import group_step as engine
from mada_optim.kernels import select
from mada_optim.kernels.triton import columns, launch, multi_tensor
from mada_optim.tensors import devices

STEP_SIZES = {"beta1": 5e-4, "rho": 0.1}
LEARNING = {"hyper_lr": STEP_SIZES, "hyper_warmup": 0, "hyper_momentum": 0.5}
NOTHING = {"hyper_lr": 0.0}


@pytest.fixture(autouse=True)
def graphs(launches, monkeypatch):  # noqa: F811
    """Kernels are those of a GPU, and graphs are recorded. Blocks are small, as are most tensors here."""
    monkeypatch.setattr(multi_tensor, "TILE", 64)
    monkeypatch.setattr(multi_tensor, "BLOCK", 32)
    stand_for_cuda(monkeypatch)


class Training:
    """Parameters with gradients that stay where they are, and an optimizer whose steps may be captured.

    Args:
        count: of parameters.
        make: makes the optimizer.
        copied: whether kernels have to work on copies of the first one.
    """

    def __init__(
        self,
        count: int = 2,
        make: Callable[..., HypergradientOptimizer] = MADA,
        copied: bool = False,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(3 + k, 4, generator=generator) for k in range(count)]
        if copied:
            tensors[0] = tensors[0][:, ::2]
        self.params = [nn.Parameter(tensor) for tensor in tensors]
        self.grads = [torch.zeros_like(param) for param in self.params]
        self.optimizer = make(self.params, **{"lr": 1e-2, "weight_decay": 0.1, **options}, capturable=True)
        self.taken = 0

    def step(self, take: Callable[[], Any] | None = None, without: int | None = None) -> None:
        """Take the next step, or let a graph do so, with the next gradients of all parameters but one."""
        generator = torch.Generator().manual_seed(self.taken)
        for k, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            grad.copy_(torch.randn(grad.shape, generator=generator))
            param.grad = None if k == without else grad
        self.taken += 1
        (take or self.optimizer.step)()

    def capture(self, without: int | None = None) -> Graph:
        for k, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            param.grad = None if k == without else grad
        return Graph(self.optimizer.step)

    def tensors(self) -> list[Tensor]:
        states = (self.optimizer.state[param] for param in self.params)
        kept = (value for group in self.optimizer.param_groups for value in group.values())
        everything = [*self.params, *(value for state in states for value in state.values()), *kept]
        return [value.detach() for value in everything if isinstance(value, Tensor)]


def same(one: Training, other: Training) -> bool:
    assert one.taken == other.taken
    assert not any(tensor.isnan().any() for tensor in one.tensors())
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {**LEARNING, "hyper_lr": EVERYTHING, "gamma": 0.5, "hyper_warmup": 3, "hyper_every": 2},
        {**NOTHING, "copied": True},
        {**NOTHING, "state_dtype": torch.bfloat16},
    ],
    ids=["everything", "nothing", "bfloat16"],
)
def test_replays_are_steps(options):
    """To the bit; as are steps between replays, and another graph's."""
    expected, training = Training(**options), Training(**options)
    for _ in range(7):
        expected.step()
    for _ in range(2):
        training.step()
    graph = training.capture()
    training.step(graph.replay)
    training.step()
    other = training.capture()
    for replayed in (other, graph):
        training.step(replayed.replay)
    training.step()
    assert same(training, expected)


@pytest.mark.parametrize("options", [LEARNING, NOTHING], ids=["learning", "nothing"])
def test_a_graph_of_many_parameters_is_as_long_as_one_of_few(options):
    lengths = []
    for count in (1, 5):
        training = Training(count, **options)
        for _ in range(2):
            training.step()
        lengths.append(len(training.capture().calls))
    assert lengths[0] == lengths[1] < 50


@pytest.mark.parametrize("options", [LEARNING, NOTHING], ids=["learning", "nothing"])
def test_a_parameter_that_the_graph_leaves_out(options):
    """Its count is another one from then on."""
    expected, training = Training(**options), Training(**options)
    without = [None, 1, 1, 1, None, None]
    for number in without:
        expected.step(without=number)
    for number in without[:2]:
        training.step(without=number)
    graph = training.capture(without=1)
    for number in without[2:4]:
        training.step(graph.replay, without=number)
    for number in without[4:]:
        training.step(without=number)
    assert same(training, expected)


def test_graphs_of_different_parameters_in_turn():
    """Counts part after the captures, so that a graph cannot take one for the other."""
    expected, training = Training(3, **NOTHING), Training(3, **NOTHING)
    without = [None, 0, 2, 2, 0, 2, None]
    for number in without:
        expected.step(without=number)
    training.step()
    graphs = {number: training.capture(without=number) for number in (0, 2)}
    for number in without[1:-1]:
        training.step(graphs[number].replay, without=number)
    training.step()
    assert same(training, expected)


def test_a_checkpoint_that_is_loaded_in_place():
    expected, training = Training(**LEARNING), Training(**LEARNING)
    for _ in range(4):
        expected.step()
    for _ in range(2):
        training.step()
    graph, stored = training.capture(), copy.deepcopy(training.tensors())
    for _ in range(3):
        training.step(graph.replay)
    for tensor, value in zip(training.tensors(), stored, strict=True):
        tensor.copy_(value)
    training.taken = 2
    for _ in range(2):
        training.step(graph.replay)
    assert same(training, expected)


def test_a_learning_rate_that_is_a_tensor_is_read_anew():
    trainings = [Training(**LEARNING, lr=torch.tensor(1e-2)) for _ in range(2)]
    steps: list[Callable[[], Any] | None] = [None, None]
    for step in range(5):
        if step == 2:
            steps[1] = trainings[1].capture().replay
        for training, take in zip(trainings, steps, strict=True):
            training.optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
            training.step(take)
    assert same(*trainings)


def test_nothing_that_is_made_in_a_graph_is_used_outside():
    """Before its first replay a graph's memory holds nothing. New step sizes are first sent in the captured step."""
    trainings = [Training(**LEARNING) for _ in range(2)]
    for training in trainings:
        for _ in range(2):
            training.step()
        training.optimizer.param_groups[0]["hyper_lr"] = {name: 1.07 * STEP_SIZES.get(name, 0.0) for name in EVERYTHING}
    trainings[1].capture()
    for training in trainings:
        training.step()
    assert same(*trainings)


def test_what_a_graph_copies_from_stays_as_long_as_the_parameters(monkeypatch):
    """Table, tiles and step sizes, which each capture sends anew."""
    sent: list[weakref.ref[Tensor]] = []
    send = devices.send

    def noted(tensor: Tensor, reader: Tensor) -> Tensor:
        sent.append(weakref.ref(tensor))
        return send(tensor, reader)

    for module in (devices, columns):
        monkeypatch.setattr(module, "send", noted)
    training = Training(**LEARNING)
    training.step()
    for _ in range(2):
        training.capture()
    training.step()
    gc.collect()
    kept = [source() is not None for source in sent]
    assert kept[1:] == [True] * len(kept[1:])  # all but what the step before sent
    assert not kept[0]
    del training
    gc.collect()
    assert not any(source() is not None for source in sent)


def test_no_memory_is_pinned_while_a_graph_is_captured(monkeypatch):
    """Steps before it have provided for that, of as many optimizers as there are."""
    pinned_in_capture: list[bool] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned_in_capture.append(Graph.recording is not None)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(devices, "PINNED", frozenset({"cpu"}))
    trainings = [Training(**LEARNING) for _ in range(2)]
    for _ in range(2):
        for training in trainings:
            training.step()
    for training in trainings:
        training.step(training.capture().replay)
    assert pinned_in_capture
    assert not any(pinned_in_capture)
    expected = Training(**LEARNING)
    for _ in range(3):
        expected.step()
    assert same(trainings[1], expected)


@pytest.mark.parametrize("reason", ["the first step", "another gradient", "other betas", "more is learned"])
def test_what_a_graph_would_not_repeat_is_refused(reason):
    training = Training(**(LEARNING if reason == "another gradient" else NOTHING))
    if reason != "the first step":
        training.step()
    group = training.optimizer.param_groups[0]
    if reason == "other betas":
        group["betas"] = (0.5, 0.6)
    if reason == "more is learned":
        group["hyper_lr"] = {**group["hyper_lr"], "beta2": 1e-3}
    before = copy.deepcopy(training.tensors())
    with pytest.raises(RuntimeError, match="take a step with these before the capture"):
        training.capture(without=0 if reason == "another gradient" else None)
    assert all(map(torch.equal, training.tensors(), before))


@pytest.mark.parametrize("family", [MADAFamily(), Unknown()], ids=["written", "left to torch.compile"])
def test_counts_that_differ_agree_with_plain(family: Family, monkeypatch):
    _compile_nothing(monkeypatch)
    trainings = []
    for kernels in (engine.select_executor, select.select_executor):
        monkeypatch.setattr(engine, "select_executor", kernels)
        make = partial(HypergradientOptimizer, family=family, hyper_warmup=0)
        fused = False if kernels is select.select_executor else None
        trainings.append(Training(make=make, copied=True, fused=fused))
        for without in (None, 0, None, None):  # in the last step counts differ within a batch
            trainings[-1].step(without=without)
    torch.testing.assert_close(*(each.tensors() for each in trainings), rtol=FLOAT32, atol=FLOAT32)


def test_a_step_never_waits_for_the_device(monkeypatch):
    """The device is played by "meta", whose tensors have no values that a program could read."""
    monkeypatch.setattr(launch.Kernel, "launch", lambda *_, **__: None)
    params = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(40, 300), (5,)]]
    optimizer = MADA(params, lr=1e-2, capturable=True, hyper_lr={"rho": 0.1}, hyper_warmup=0)
    for step in range(5):
        for param in params:
            param.grad = torch.zeros_like(param)
        if step < 3:
            optimizer.step()
        else:
            with NoTransfer():
                optimizer.step()
