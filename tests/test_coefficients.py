"""The rule that moves the coefficients, in numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from mada_optim import LearningRule


def run(rule: LearningRule, hypergradients: list[list[float]], alpha=(0.1, 0.1, 0.0), box=(0.0, 1.0)):
    values = torch.tensor([0.5, 0.95, 0.3], dtype=torch.float64)
    buffer, skipped = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for h in hypergradients:
        rule.learn(values, buffer, skipped, torch.tensor(h, dtype=torch.float64), alpha, [box] * 3)
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
