"""A slow twin of the family in the paper's notation: scalars of Python lists would be slower only by a constant.

Written from the formulas, independently of ``mada_optim``: no shared helper, no torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Twin:
    """MADA with fixed or prescribed coefficients, for a list of float64 tensors that it changes in place.

    ``q`` may be changed between steps. ``adan_debiasing`` divides n by 1 - β3^t, as Adan does and MADA does not.
    """

    def __init__(
        self,
        x: list[Tensor],
        lr: float,
        q: dict[str, float],
        eps: float = 1e-8,
        wd: float = 0.0,
        kappa: tuple[float, float] = (0.95, 0.98),
        adan_debiasing: bool = False,
    ) -> None:
        self.x, self.lr, self.q, self.eps, self.wd, self.kappa = x, lr, dict(q), eps, wd, kappa
        self.adan_debiasing = adan_debiasing
        self.t = 0
        self.states = [{k: torch.zeros_like(p) for k in ("m", "v", "vbar", "n", "l", "g")} for p in x]

    def directions(self, gradients: list[Tensor], q: dict[str, float] | None = None):
        """Δ_t and the new state for each tensor; nothing is changed."""
        q = q or self.q
        b1, b2, b3, rho, c, gamma = (q[k] for k in ("beta1", "beta2", "beta3", "rho", "c", "gamma"))
        t = self.t + 1
        out = []
        for g, s in zip(gradients, self.states, strict=True):
            d = g - s["g"] if t > 1 else torch.zeros_like(g)
            m = b1 * s["m"] + (1 - b1) * g
            n = b3 * s["n"] + (1 - b3) * d
            ghat = g + b3 * d
            sgn = torch.sign(ghat**2 - s["v"])
            y = s["v"] + sgn * ghat**2
            r = c * ghat**2 + (1 - c) * y
            v = b2 * s["v"] + (1 - b2) * r
            vbar = s["vbar"] + (v - s["vbar"]) / t
            V = (rho * v + (1 - rho) * vbar) / (1 - b2**t)
            nhat = n / (1 - b3**t) if self.adan_debiasing else n
            a = (m / (1 - b1**t) + b3 * nhat) / (V.sqrt() + self.eps)
            u = self.kappa[0] * s["l"] + (1 - self.kappa[0]) * g
            l = self.kappa[1] * s["l"] + (1 - self.kappa[1]) * g  # noqa: E741
            delta = gamma * a + (1 - gamma) * torch.sign(u)
            out.append((delta, {"m": m, "v": v, "vbar": vbar, "n": n, "l": l, "g": g.clone()}))
        return out

    def peek(self, gradients: list[Tensor], q: dict[str, float]) -> list[Tensor]:
        """x_{t+1}, had this step been taken with ``q``."""
        return [
            (1 - self.lr * self.wd) * x - self.lr * delta
            for x, (delta, _) in zip(self.x, self.directions(gradients, q), strict=True)
        ]

    def step(self, gradients: list[Tensor]) -> None:
        out = self.directions(gradients)
        for i, (delta, state) in enumerate(out):
            self.x[i].mul_(1 - self.lr * self.wd).sub_(self.lr * delta)
            self.states[i] = state
        self.t += 1


class MatrixTwin(Twin):
    """OMADA with matrices alone. ``orthogonal`` makes U of a matrix; μ and β are those of its momentum and its rows."""

    def __init__(
        self,
        x: list[Tensor],
        lr: float,
        q: dict[str, float],
        orthogonal: Callable[[Tensor], Tensor],
        mu: float = 0.95,
        beta: float = 0.95,
        wd: float = 0.0,
    ) -> None:
        super().__init__(x, lr, q, wd=wd)
        self.orthogonal, self.mu, self.beta = orthogonal, mu, beta
        for p, s in zip(x, self.states, strict=True):
            s["M"], s["r"] = torch.zeros_like(p), torch.zeros_like(p[:, :1])

    def directions(self, gradients: list[Tensor], q: dict[str, float] | None = None):
        q = q or self.q
        omega, nu, mu, beta = q["ortho"], q["row_norm"], self.mu, self.beta
        out = []
        for (D, state), g, s in zip(super().directions(gradients, q), gradients, self.states, strict=True):
            M = mu * s["M"] + (1 - mu) * g
            U = self.orthogonal(mu * M + (1 - mu) * g)
            r = beta * s["r"] + (1 - beta) * (U**2).mean(1, keepdim=True)
            O = 0.2 * max(U.shape) ** 0.5 * U  # noqa: E741
            N = normuon_rows(U, r) * (O.norm() / U.norm())
            out.append(((1 - omega) * D + omega * ((1 - nu) * O + nu * N), {**state, "M": M, "r": r}))
        return out


def normuon_rows(U: Tensor, r: Tensor) -> Tensor:
    """NorMuon's step of a matrix: rows of U over the roots of their second moments r, with the norm of U."""
    divided = U / (r.sqrt() + 1e-8)
    return divided * (U.norm() / divided.norm())


def closed_form_alignment(twin: Twin, gradients: list[Tensor], next_gradients: list[Tensor]) -> dict[str, float]:
    """⟨g_{t+1}, ∂Δ_t/∂q⟩ by the closed formulas, for the step that ``twin`` is about to take with ``gradients``."""
    q, t = twin.q, twin.t + 1
    b1, b2, b3, rho, c, gamma = (q[k] for k in ("beta1", "beta2", "beta3", "rho", "c", "gamma"))
    total = dict.fromkeys(q, 0.0)
    for g, w, s in zip(gradients, next_gradients, twin.states, strict=True):
        d = g - s["g"] if t > 1 else torch.zeros_like(g)
        m, n, ghat = b1 * s["m"] + (1 - b1) * g, b3 * s["n"] + (1 - b3) * d, g + b3 * d
        sgn = torch.sign(ghat**2 - s["v"])
        y = s["v"] + sgn * ghat**2
        r = c * ghat**2 + (1 - c) * y
        v = b2 * s["v"] + (1 - b2) * r
        vbar = s["vbar"] + (v - s["vbar"]) / t
        V = (rho * v + (1 - rho) * vbar) / (1 - b2**t)
        root = V.sqrt() + twin.eps
        a = (m / (1 - b1**t) + b3 * n) / root
        u = twin.kappa[0] * s["l"] + (1 - twin.kappa[0]) * g
        dV = torch.where(V > 0, -gamma * a / (2 * V.sqrt() * root), 0.0)
        dVdv = (rho + (1 - rho) / t) / (1 - b2**t)
        derivative = {
            "beta1": gamma / root * ((s["m"] - g) / (1 - b1**t) + m * t * b1 ** (t - 1) / (1 - b1**t) ** 2),
            "beta2": dV * (dVdv * (s["v"] - r) + V * t * b2 ** (t - 1) / (1 - b2**t)),
            "beta3": gamma / root * (n + b3 * (s["n"] - d)) + dV * dVdv * (1 - b2) * 2 * ghat * d * (c + (1 - c) * sgn),
            "rho": dV * (v - vbar) / (1 - b2**t),
            "c": dV * dVdv * (1 - b2) * (ghat**2 - y),
            "gamma": a - torch.sign(u),
        }
        for name, value in derivative.items():
            total[name] += float((w * value).sum())
    return total
