"""The family of MADA: its update, written once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.families.base import Buffers, Coefficient, Family, is_frozen_at
from mada_optim.families.numerics import cut, root

BELOW_ONE = math.nextafter(1.0, 0.0)


def _decay(
    name: str, symbol: str, meaning: str, default: float, box: tuple[float, float], **options: Any
) -> Coefficient:
    return Coefficient(name, default, box, domain=(0.0, BELOW_ONE), symbol=symbol, meaning=meaning, **options)


def _share(name: str, symbol: str, meaning: str, frozen_at: tuple[float, ...]) -> Coefficient:
    unit = (0.0, 1.0)
    return Coefficient(name, 1.0, unit, 0.1, domain=unit, frozen_at=frozen_at, symbol=symbol, meaning=meaning)


@dataclass(frozen=True)
class MADAFamily(Family):
    """The family of MADA, which contains Adam, AVGrad, Yogi, Adan and Lion (Ozkara et al., ICML 2024, section 3).

    With g the gradient and d_t = g_t - g_{t-1} its change (d_1 = 0)::

        m_t = β1 m_{t-1} + (1-β1) g_t                                   exp_avg
        n_t = β3 n_{t-1} + (1-β3) d_t                                   exp_avg_diff
        ĝ_t = g_t + β3 d_t
        y_t = v_{t-1} + sign(ĝ_t² - v_{t-1}) ĝ_t²                       Yogi's target
        v_t = β2 v_{t-1} + (1-β2) (c ĝ_t² + (1-c) y_t)                  exp_avg_sq
        v̄_t = v̄_{t-1} + (v_t - v̄_{t-1})/t                               mean_exp_avg_sq
        V_t = (ρ v_t + (1-ρ) v̄_t) / (1-β2^t)
        a_t = (m_t/(1-β1^t) + β3 n_t) / (√V_t + ε)
        u_t = κ1 l_{t-1} + (1-κ1) g_t ;  l_t = κ2 l_{t-1} + (1-κ2) g_t   lion_exp_avg
        Δ_t = γ a_t + (1-γ) sign(u_t)

    Elements of g_t beyond ±7.2e16 (in float32) count as that, see :func:`cut`. (torch's AdamW never moves an element
    again once its squared gradient has overflowed.)

    Buffers that no learned or non-neutral coefficient needs are neither kept nor computed: at Adam's point
    (β3 = 0, ρ = c = γ = 1, frozen) two are left, at Lion's (γ = 0) one.
    """

    coefficients: ClassVar[tuple[Coefficient, ...]] = (
        _decay("beta1", "β1", "decay of the average of gradients", 0.9, (0.01, 0.99), hyper_lr=5e-4),
        # Frozen by default: learning β2 cancels the gain of the others (docs/results/2026-11-24-defaults).
        _decay("beta2", "β2", "decay of the average of squared gradients", 0.999, (0.5, 0.999), hyper_lr=0.0),
        _decay("beta3", "β3", "share of Adan's differences", 0.0, (0.0, 0.99), hyper_lr=0.1, frozen_at=(0.0,)),
        _share("rho", "ρ", "second moment: 1 is Adam's, 0 AVGrad's average of it", frozen_at=(1.0,)),
        _share("c", "c", "second moment: 1 is Adam's, 0 Yogi's", frozen_at=(1.0,)),
        _share("gamma", "γ", "direction: 1 is Adam's, 0 Lion's", frozen_at=(0.0, 1.0)),
    )
    constants: ClassVar[Mapping[str, Any]] = {"eps": 1e-8, "lion_betas": (0.95, 0.98)}
    name: str = field(default="MADA", init=False)

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.buffers`.

        >>> MADAFamily().buffers({"beta3": 0.0, "rho": 1.0, "gamma": 1.0})
        ('exp_avg', 'exp_avg_sq')
        """
        names: list[str] = []
        if not is_frozen_at(q["gamma"], 0.0):
            names += ["exp_avg", "exp_avg_sq"]
            if not is_frozen_at(q["rho"], 1.0):
                names += ["mean_exp_avg_sq"]
            if not is_frozen_at(q["beta3"], 0.0):
                names += ["exp_avg_diff", "previous_grad"]
        if not is_frozen_at(q["gamma"], 1.0):
            names += ["lion_exp_avg"]
        return tuple(names)

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        gamma, grad = q["gamma"], cut(grad)
        if is_frozen_at(gamma, 1.0):
            return self._adaptive(state, grad, q, step)
        if is_frozen_at(gamma, 0.0):
            return self._sign(state, grad, q)
        adaptive, adaptive_state = self._adaptive(state, grad, q, step)
        sign, sign_state = self._sign(state, grad, q)
        return gamma * adaptive + (1 - gamma) * sign, adaptive_state | sign_state

    def _adaptive(self, state: Buffers, g: Tensor, q: Mapping[str, Any], t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """a_t: Adam, AVGrad, Yogi and Adan."""
        beta1, beta2, beta3, rho, c = (q[name] for name in ("beta1", "beta2", "beta3", "rho", "c"))
        new: dict[str, Tensor] = {}

        m = new["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        numerator = m / (1 - beta1**t)
        lookahead = g
        if "exp_avg_diff" in state:
            d = torch.where(t > 1, g - state["previous_grad"], 0.0)
            n = new["exp_avg_diff"] = beta3 * state["exp_avg_diff"] + (1 - beta3) * d
            new["previous_grad"] = g
            numerator = numerator + beta3 * n
            lookahead = g + beta3 * d

        v = state["exp_avg_sq"]
        square = lookahead * lookahead
        target = square
        if not is_frozen_at(c, 1.0):
            yogi = v + torch.sign(square - v) * square
            target = c * square + (1 - c) * yogi
        v = new["exp_avg_sq"] = beta2 * v + (1 - beta2) * target
        if "mean_exp_avg_sq" in state:
            mean = new["mean_exp_avg_sq"] = self._long_term(state["mean_exp_avg_sq"], v, t)
            v = rho * v + (1 - rho) * mean
        return numerator / (root(v / (1 - beta2**t)) + q["eps"]), new

    def _long_term(self, mean: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """v̄_t: AVGrad's average over all second moments so far."""
        return mean + (v - mean) / t

    def _sign(self, state: Buffers, g: Tensor, q: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """sign(u_t): Lion."""
        momentum = state["lion_exp_avg"]
        kappa1, kappa2 = q["lion_betas"]
        u = kappa1 * momentum + (1 - kappa1) * g
        # torch.sign(NaN) is 0, which would hide it.
        return torch.sign(u) + 0 * u, {"lion_exp_avg": kappa2 * momentum + (1 - kappa2) * g}

    def validate_constants(self, constants: Mapping[str, Any]) -> None:
        """See :meth:`Family.validate_constants`."""
        eps, lion_betas = constants["eps"], constants["lion_betas"]
        if not (isinstance(eps, (int, float)) and 0.0 <= eps < math.inf):
            raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
        if not (
            isinstance(lion_betas, (tuple, list))
            and len(lion_betas) == 2
            and all(isinstance(beta, (int, float)) and 0.0 <= beta <= 1.0 for beta in lion_betas)
        ):
            raise ValueError(f"lion_betas must be two numbers in [0, 1], got {lion_betas!r}")
