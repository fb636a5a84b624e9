"""The learned scale with AdamW in the notation of the documentation, slow: W itself is kept, and nothing is clever."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

GRADIENTS = Callable[[list[Tensor]], list[Tensor]]


def train(
    x_1: list[Tensor],
    gradients: Callable[[int, list[Tensor]], list[Tensor]],
    rates: list[float],
    weight_decay: float,
    hold: int,
    start: float = 1e-3,
) -> tuple[list[Tensor], list[float]]:
    """Parameters after ``len(rates)`` steps of AdamW with betas (0.9, 0.999), and κ of each step.

    Args:
        x_1: parameters, float64.
        gradients: of the parameters at a step.
        rates: the learning rate that is given at each step.
        weight_decay: λ.
        hold: number of steps of the search.
        start: κ at first.
    """
    zeros = [0 * x for x in x_1]
    m, v, way, mean_way = list(zeros), list(zeros), list(zeros), list(zeros)
    x, kappa, mean, square, recent, taken, waiting = list(x_1), start, 0.0, 0.0, 0.0, 0, None
    peak, kappas = 0.0, []
    for t, rate in enumerate(rates, start=1):
        g = gradients(t, x)
        peak = max(peak, rate)
        eta, at = rate / peak, kappa
        if waiting is not None:
            taken += 1
            mean, square = 0.9 * mean + 0.1 * waiting, 0.99 * square + 0.01 * waiting**2
            recent = 0.95 * recent + 0.05 * waiting**2
            slope = mean / (1 - 0.9**taken) / math.sqrt(square / (1 - 0.99**taken))
            slope = max(-1.0, min(1.0, slope))
            kappa *= math.exp(-0.1 * slope)
            waiting = None
        if t <= hold:
            if t > 1:
                mean_way = [0.97 * a + 0.03 * w for a, w in zip(mean_way, way, strict=True)]
                inner = [(d * (0.5 * w + 0.5 * a)).sum() for d, w, a in zip(g, way, mean_way, strict=True)]
                mean_way = [a.bfloat16().double() for a in mean_way]  # as it is kept
                waiting = -at * float(sum(inner))
            x = [first - kappa * w for first, w in zip(x_1, way, strict=True)]
            factor = kappa
        else:
            left = math.sqrt(recent / (1 - 0.95**taken) / (square / (1 - 0.99**taken)))
            factor = 1.5 ** min(1.0, left) * kappa
        m = [0.9 * a + 0.1 * d for a, d in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * d * d for a, d in zip(v, g, strict=True)]
        for i in range(len(x)):
            u = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8) + weight_decay * x[i]
            way[i] = way[i] + eta * u
            x[i] = x[i] - factor * eta * u
        kappas.append(factor)
    return x, kappas
