"""Models: checkpointed, tied, frozen in part, averaged, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import EVERY_LEARNING_ROW, EVERY_ROW, assert_same, everything, pair
from problems import Net, Row, loss_of, train
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from mada_optim import MADA, load_optimizer


class Checkpointed(Net):
    """The same network, which forgets its activations and computes them again."""

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.norm(self.embedding(x))
        hidden = checkpoint(lambda e: torch.tanh(self.hidden(e)), embedded, use_reentrant=False)
        return self.out(hidden)


@EVERY_ROW
def test_gradient_checkpointing(row: Row):
    (plain_model, plain), _ = pair(row)
    model = Checkpointed()
    optimizer = row(model.parameters(), lr=1e-2)
    train(model, optimizer, 12)
    train(plain_model, plain, 12)
    assert_same(everything(optimizer), everything(plain))


class Tied(nn.Module):
    """A language model's ends: what embeds a token also recognizes it."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 11, bias=False, dtype=torch.float64)
        if share:
            self.head.weight = self.embedding.weight
        else:
            del self.head

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(x))
        head = getattr(self, "head", None)
        return head(hidden) if head is not None else hidden @ self.embedding.weight.T


@EVERY_ROW
def test_tied_weights(row: Row):
    """As if the module had one matrix that it uses twice; they stay tied, also in a copy."""
    results = []
    for share in (True, False):
        torch.manual_seed(0)
        model = Tied(share)
        optimizer = row(model.parameters(), lr=1e-2)
        train(model, optimizer, 6)
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, 6, first=6)
        assert not share or model.head.weight is model.embedding.weight
        results.append(everything(optimizer))
    assert_same(*results)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_and_later_unfrozen_as_in_torch(set_to_none: bool):
    """Without a gradient a parameter rests; with a gradient of zeros it still drifts. Both are AdamW's behaviour."""
    models, results = [Net(), Net()], []
    for model, make in zip(models, (load_optimizer("adamw"), torch.optim.AdamW), strict=True):
        model.embedding.requires_grad_(False)
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
        frozen = []
        for step in range(16):
            if step in (4, 8, 12):
                model.embedding.requires_grad_(step != 8)
            before = model.embedding.weight.detach().clone()
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.step()
            frozen.append(torch.equal(before, model.embedding.weight))
        results.append(frozen)
    rests = [True] * 4 + [False] * 4 + [set_to_none] * 4 + [False] * 4
    assert results[0] == results[1] == rests
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@EVERY_LEARNING_ROW
def test_the_hypergradient_is_of_the_parameters_that_were_and_are_trained(row: Row):
    """Freezing a layer leaves the hypergradient of the others; a layer that has just been unfrozen adds nothing yet."""
    last = 8 if row.name == "mada-every-3" else 7
    model, part_model = Net(), Net()
    optimizer = row(model.parameters(), lr=1e-2, hyper_lr=_still(row))
    part = row([*part_model.hidden.parameters(), *part_model.out.parameters()], lr=1e-2, hyper_lr=_still(row))
    model.embedding.requires_grad_(False)
    model.norm.requires_grad_(False)
    train(model, optimizer, last)
    train(part_model, part, last)
    for layer in (model.embedding, model.norm):
        layer.requires_grad_(True)
    train(model, optimizer, 1, first=last)
    train(part_model, part, 1, first=last)
    assert optimizer.hypergradients() == pytest.approx(part.hypergradients(), rel=1e-12)
    assert any(part.hypergradients().values())


def _still(row: Row) -> dict[str, float]:
    """Learned, but never moved by an amount that could be seen."""
    probe = row([nn.Parameter(torch.zeros(1))])
    return {name: 1e-300 for name, alpha in probe.param_groups[0]["hyper_lr"].items() if alpha > 0.0}


@EVERY_ROW
def test_averaged_weights(row: Row):
    """The average is that of the weights after each step, and averaging does not touch the training."""
    (model, optimizer), (plain_model, plain) = pair(row)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    expected: list[Tensor] = []
    for step in range(12):
        train(model, optimizer, 1, first=step)
        averaged.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = [0.8 * e + 0.2 * p for e, p in zip(expected or now, now, strict=True)]
    train(plain_model, plain, 12)
    assert_same(everything(optimizer), everything(plain))
    torch.testing.assert_close([p.detach() for p in averaged.module.parameters()], expected, rtol=0, atol=1e-14)


def test_a_compiled_model():
    """The optimizer may be made before or after the model is compiled: the parameters are the same objects."""
    plain = Net()
    reference = MADA(plain.parameters(), lr=1e-2, hyper_warmup=2)
    train(plain, reference, 8)
    for before in (True, False):
        model = Net()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = MADA((model if before else compiled).parameters(), lr=1e-2, hyper_warmup=2)
        train(compiled, optimizer, 8)
        torch.testing.assert_close(everything(optimizer), everything(reference), rtol=1e-10, atol=1e-12)
