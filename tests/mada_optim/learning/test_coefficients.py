"""The rule that moves the coefficients, in numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from mada_optim import Coefficient, LearningRule
from mada_optim.learning import LearnedTensors

PLAIN = [Coefficient(name, 0.5, (0.0, 1.0), 0.1) for name in "abc"]


def run(rule: LearningRule, hypergradients: list[list[float]], alpha=(0.1, 0.1, 0.0), box=(0.0, 1.0), kinds=PLAIN):
    values = torch.tensor([0.5, 0.95, 0.3], dtype=torch.float64)
    buffer, square = torch.zeros(2, 3, dtype=torch.float64).unbind()
    taken, skipped = torch.zeros(2, dtype=torch.int64).unbind()
    learned = LearnedTensors(values, buffer, square, taken)
    for h in hypergradients:
        rule.learn(learned, skipped, torch.tensor(h, dtype=torch.float64), kinds, alpha, [box] * 3)
    assert int(taken) + int(skipped) == len(hypergradients)
    return [round(v, 12) for v in values.tolist()], [round(b, 12) for b in buffer.tolist()], int(skipped)


def test_step_projection_and_frozen():
    rule = LearningRule(momentum=0.0, clip=10.0, warmup=0, every=1)
    assert run(rule, [[1.0, -1.0, 1.0]]) == ([0.4, 1.0, 0.3], [1.0, -1.0, 1.0], 0)


def test_clip():
    rule = LearningRule(momentum=0.0, clip=2.0, warmup=0, every=1)
    assert run(rule, [[100.0, 1.0, 0.0]])[0] == [0.3, 0.85, 0.3]


def test_momentum():
    rule = LearningRule(momentum=0.5, clip=10.0, warmup=0, every=1)
    assert run(rule, [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])[:2] == ([0.25, 0.7, 0.3], [1.5, 1.5, 0.0])


def test_not_finite():
    rule = LearningRule(momentum=0.5, clip=10.0, warmup=0, every=1)
    for bad in (math.nan, math.inf, -math.inf):
        assert run(rule, [[bad, 1.0, 0.0]]) == ([0.5, 0.95, 0.3], [0.0, 0.0, 0.0], 1)


def test_a_normalized_coefficient_does_not_see_the_scale_of_the_loss():
    """Its first step is α against the sign, whatever h; later ones are α times a mean over a root mean square."""
    rule = LearningRule(momentum=0.0, clip=10.0, warmup=0, every=1)
    kinds = [Coefficient(name, 0.5, (0.0, 1.0), 0.1, normalized=True) for name in "abc"]
    path = [[3.0, -2.0, 1.0], [-1.0, -2.0, 1.0], [0.5, 1.0, 1.0]]
    first, _, _ = run(rule, path[:1], kinds=kinds)
    assert first == [0.4, 1.0, 0.3]
    for factor in (1e-12, 1e12):
        scaled = [[factor * h for h in step] for step in path]
        assert run(rule, scaled, kinds=kinds)[0] == run(rule, path, kinds=kinds)[0]
    mean = (0.9 * 0.1 * 3 + 0.1 * -1) / (1 - 0.9**2)
    size = math.sqrt((0.99 * 0.01 * 9 + 0.01) / (1 - 0.99**2))
    assert run(rule, path[:2], kinds=kinds)[0][0] == round(0.4 - 0.1 * mean / size, 12)


def test_zero_hypergradients_leave_a_normalized_coefficient():
    rule = LearningRule(momentum=0.0, clip=10.0, warmup=0, every=1)
    kinds = [Coefficient(name, 0.5, (0.0, 1.0), 0.1, normalized=True) for name in "abc"]
    assert run(rule, [[0.0, 0.0, 0.0]] * 3, kinds=kinds)[0] == [0.5, 0.95, 0.3]
