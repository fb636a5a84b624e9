"""The rule that moves one scale, and what is made of it when it is held."""

import math
import random

import pytest
import torch

from mada_optim import LearnedScale
from mada_optim.scale.rule import ADAPTIVE, ScaleState, SearchSettings, held_scale, learn

# Of the learned scale in a parameter group of a state_dict; checkpoints without it are older.
LATER = "recent"


def searched(sizes: list[float]) -> ScaleState:
    """The scale after hypergradients of random signs and these sizes."""
    signs = random.Random(0)
    state = ScaleState(math.log(ADAPTIVE.start))
    for size in sizes:
        state = learn(ADAPTIVE, state, size * signs.gauss(0.0, 1.0))
    return state


def test_where_noise_stays_the_margin_is_whole():
    state = searched([1.0] * 150)
    assert held_scale(ADAPTIVE, state) / state.value == pytest.approx(ADAPTIVE.margin, rel=0.1)


def test_where_hypergradients_grow_the_margin_is_not_exceeded():
    state = searched([1.03**step for step in range(150)])
    assert held_scale(ADAPTIVE, state) == state.value * ADAPTIVE.margin


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_where_hypergradients_die_out_little_of_the_margin_is_left(unit: float):
    state = searched([unit * 0.97**step for step in range(150)])
    assert 1.0 < held_scale(ADAPTIVE, state) / state.value < ADAPTIVE.margin**0.5


def test_nothing_learned_holds_the_start_with_the_margin():
    settings = SearchSettings()
    assert held_scale(settings, ScaleState(math.log(settings.start))) == pytest.approx(settings.start * settings.margin)


@pytest.mark.parametrize("later", [0, 1, 5])
def test_a_checkpoint_of_before_goes_on_as_if_nothing_had_died_out(later: int):
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, LearnedScale]:
        weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = torch.optim.AdamW([weight])
        return weight, optimizer, LearnedScale(optimizer)

    weight, optimizer, _ = make()
    for _ in range(20):
        weight.grad = torch.ones(2)
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["learned_scale"].pop(LATER) > 0.0
    other_weight, other, scale = make()
    other.load_state_dict(saved)
    for _ in range(later):
        other_weight.grad = torch.ones(2)
        other.step()
    before = scale.value
    scale.hold()
    assert scale.value / before > ADAPTIVE.margin**0.9


def test_a_hypergradient_whose_square_is_not_finite_is_passed_over():
    state = searched([1.0] * 5)
    for h in (1e-170, 1e200, -1e200, math.inf):
        assert learn(ADAPTIVE, state, h) == state
