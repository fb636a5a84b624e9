"""Proposition 1, in both directions: on exact fractions, and on what the optimizer does."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mada_lab.theory import gradient_threshold, mean_factor, rate_does_not_increase
from mada_optim import AVGrad

BETA2 = st.sampled_from([Fraction(n, d) for n, d in ((0, 1), (1, 3), (1, 2), (9, 10), (99, 100))])
# Few distinct values, so that ties occur, and zeros.
GRADIENTS = st.lists(st.sampled_from([Fraction(n, 4) for n in (0, 0, 1, 2, 3, 4, 40)]), min_size=2, max_size=12)


def moments(gradients, beta2):
    """(v_t, v̄_t) for t = 1, 2, ..., by their definitions."""
    v, all_v, out = Fraction(0), [], []
    for g in gradients:
        v = beta2 * v + (1 - beta2) * g**2
        all_v.append(v)
        out.append((v, sum(all_v) / len(all_v)))
    return out


@settings(max_examples=300, deadline=None)
@given(gradients=GRADIENTS, beta2=BETA2, bias_correction=st.booleans())
def test_the_rate_does_not_increase_exactly_where_the_proposition_says(gradients, beta2, bias_correction):
    history = moments(gradients, beta2)
    for t in range(2, len(gradients) + 1):
        (old_v, old_mean), (v, mean) = history[t - 2], history[t - 1]
        denominator, old_denominator = mean, old_mean
        if bias_correction:
            denominator, old_denominator = mean / (1 - beta2**t), old_mean / (1 - beta2 ** (t - 1))
        true = denominator >= old_denominator
        assert rate_does_not_increase(v, old_mean, beta2, t, bias_correction) == true
        assert (gradients[t - 1] ** 2 >= gradient_threshold(old_v, old_mean, beta2, t, bias_correction)) == true


@settings(max_examples=200, deadline=None)
@given(gradients=GRADIENTS, beta2=BETA2)
def test_with_falling_learning_rates_the_rate_never_increases(gradients, beta2):
    """t v̄_t and t V_t do not decrease, and so √t (√V_t + ε) does not."""
    means = [mean for _, mean in moments(gradients, beta2)]
    plain = [t * mean for t, mean in enumerate(means, 1)]
    corrected = [value / (1 - beta2**t) for t, value in enumerate(plain, 1)]
    assert plain == sorted(plain)
    assert corrected == sorted(corrected)


def test_without_bias_correction_the_condition_is_the_papers():
    assert mean_factor(0.9, 2, bias_correction=False) == 1
    # After g = 1 the rate grows at g_2² = 1.5 with bias correction, where the threshold is 1 + β2, and not without.
    assert gradient_threshold(0.1, 0.1, 0.9, 2) == pytest.approx(1.9)
    assert gradient_threshold(0.1, 0.1, 0.9, 2, bias_correction=False) == pytest.approx(0.1)


def test_the_factor_falls_to_one():
    factors = [mean_factor(0.9, t) for t in range(2, 400)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0, abs=1e-12)


def test_there_is_no_rate_before_the_first_step():
    with pytest.raises(ValueError, match="step must be an integer >= 2, .* got 1"):
        mean_factor(0.9, 1)


@pytest.mark.parametrize("beta2", [1, 1.5, -0.1, torch.tensor([0.5, 1.0])])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_beta2_is_checked(beta2, bias_correction):
    for function in (rate_does_not_increase, gradient_threshold):
        with pytest.raises(ValueError, match=r"beta2 must be in \[0, 1\), got"):
            function(1.0, 1.0, beta2, 3, bias_correction)


@pytest.mark.parametrize("falling", [False, True])
def test_the_optimizer_does_what_the_proposition_says(falling):
    """Rates are read off AVGrad's own steps, second moments off its state; coordinates are independent sequences."""
    steps, beta2, lr = 60, 0.8, 0.1
    x = torch.nn.Parameter(torch.zeros(500, dtype=torch.float64))
    optimizer = AVGrad([x], lr=lr, betas=(0.0, beta2), weight_decay=0.0)
    old_rate = old_v = old_mean = None
    seen = {True: 0, False: 0}
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr / t**0.5 if falling else lr
        x.grad = torch.randn(500, dtype=torch.float64) * torch.rand(500, dtype=torch.float64) ** 2
        before = x.detach().clone()
        optimizer.step()
        rate = (before - x.detach()) / x.grad
        v, mean = (optimizer.state[x][name].clone() for name in ("exp_avg_sq", "mean_exp_avg_sq"))
        if t > 1:
            # Differences of this size are rounding.
            clear = (rate / old_rate - 1).abs() > 1e-9
            grew = (rate > old_rate)[clear]
            if falling:
                assert not grew.any()
            else:
                assert (rate_does_not_increase(v, old_mean, beta2, t)[clear] == ~grew).all()
                assert ((x.grad**2 >= gradient_threshold(old_v, old_mean, beta2, t))[clear] == ~grew).all()
                seen[True] += int(grew.sum())
                seen[False] += int((~grew).sum())
        old_rate, old_v, old_mean = rate, v, mean
    if not falling:
        assert min(seen.values()) > 1000
