"""What a family of optimizers is, and the family of MADA: the update, written once.

A family is a set of coefficients with the boxes they may move in, the names of the buffers it keeps for every array,
and one pure function that turns (buffers, gradient, coefficients) into (direction, new buffers). The hypergradient is
the derivative of that function.

A coefficient reaches the function as a scalar array. Frozen at one of certain values (``frozen_at``) it is a plain
float instead, so the function can leave out what that value makes superfluous (:func:`is_frozen_at`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Buffers = Mapping[str, jax.Array]
Values = Mapping[str, Any]
Update = Callable[[Buffers, jax.Array, Values, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Coefficient:
    """One learnable number of an update rule.

    Args:
        name: under which users set it, and the update function finds it.
        default: where it starts.
        box: closed interval in which learning keeps it.
        hyper_lr: default step size α of its gradient descent.
        domain: closed interval outside which the update makes no sense, learned or not.
        frozen_at: values at which, when frozen, it is handed to the update as a plain float.

    >>> Coefficient("momentum", 0.9, box=(0.0, 0.99), hyper_lr=0.1).domain
    (-inf, inf)
    """

    name: str
    default: float
    box: tuple[float, float]
    hyper_lr: float
    domain: tuple[float, float] = (-math.inf, math.inf)
    frozen_at: tuple[float, ...] = ()


@dataclass(frozen=True)
class Family:
    """An update rule whose coefficients can be learned.

    Args:
        coefficients: what can be learned.
        buffers: a function from the coefficients by name to the names of the buffers that each array needs. Buffers
            start at zero, in the array's shape. Only which coefficients are plain floats, and their values, may matter.
        update: one step. Its arguments are the buffers by name; the gradient g_t in their dtype; the coefficients by
            name, as scalars of that dtype or as floats where :func:`is_frozen_at`; and the step t = 1, 2, ... as such a
            scalar. It returns the direction Δ_t, by which x_{t+1} = (1 - ηλ) x_t - η Δ_t, and the new buffers.
        elementwise: whether every element of the direction depends on the same element of the inputs alone, so that
            arrays may be cut into pieces. False: whole arrays are handed over.

    >>> def update(state, grad, q, step):
    ...     velocity = q["momentum"] * state["velocity"] + grad
    ...     return velocity, {"velocity": velocity}
    >>> momentum = Coefficient("momentum", 0.9, box=(0.0, 0.99), hyper_lr=0.1)
    >>> sgd = Family((momentum,), lambda q: ("velocity",), update)
    """

    coefficients: tuple[Coefficient, ...]
    buffers: Callable[[Values], tuple[str, ...]]
    update: Update
    elementwise: bool = True


def is_frozen_at(coefficient: Any, value: float) -> bool:
    """Whether ``coefficient`` is frozen at ``value``, so that the terms it switches off need not be computed.

    >>> is_frozen_at(1.0, 1.0), is_frozen_at(jnp.ones(()), 1.0)
    (True, False)
    """
    return isinstance(coefficient, float) and coefficient == value


def root(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0: elements that never saw a gradient must not yield NaN.

    >>> float(jax.grad(root)(0.0))
    0.0
    """
    nonzero = x != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, x, 1)), 0)


def cut(grad: jax.Array) -> jax.Array:
    """Gradients whose square, or what is computed from it, would overflow, cut to the largest one that is safe.

    That is 7.2e16 in float32. What is not finite becomes NaN, so that it is seen.
    """
    largest = math.sqrt(float(jnp.finfo(grad.dtype).max)) / 256  # type: ignore[no-untyped-call]
    return jnp.clip(grad, -largest, largest) + 0 * grad


def mada_family(eps: float = 1e-8, lion_betas: tuple[float, float] = (0.95, 0.98)) -> Family:
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

    Buffers that no learned or non-neutral coefficient needs are neither kept nor computed: at Adam's point
    (β3 = 0, ρ = c = γ = 1, frozen) two are left, at Lion's (γ = 0) one.

    Args:
        eps: ε. Default: 1e-8.
        lion_betas: κ, the two momentum coefficients of Lion, not learned. Default: (0.95, 0.98).

    Returns:
        The family, for :func:`hypergradient_optimizer`.

    References:
        Ozkara et al., `MADA: Meta-Adaptive Optimizers through hyper-gradient Descent
        <https://arxiv.org/abs/2401.08893>`_, 2024

    >>> [coefficient.name for coefficient in mada_family().coefficients]
    ['b1', 'b2', 'b3', 'rho', 'c', 'gamma']
    """
    kappa1, kappa2 = lion_betas

    def update(state: Buffers, grad: jax.Array, q: Values, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        gamma, g = q["gamma"], cut(grad)
        if is_frozen_at(gamma, 1.0):
            return adaptive(state, g, q, step)
        if is_frozen_at(gamma, 0.0):
            return sign(state, g)
        direction, adaptive_state = adaptive(state, g, q, step)
        signs, sign_state = sign(state, g)
        return gamma * direction + (1 - gamma) * signs, adaptive_state | sign_state

    def adaptive(state: Buffers, g: jax.Array, q: Values, t: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """a_t: Adam, AVGrad, Yogi and Adan."""
        b1, b2, b3, rho, c = (q[name] for name in ("b1", "b2", "b3", "rho", "c"))
        new: dict[str, jax.Array] = {}

        m = new["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        numerator = m / (1 - b1**t)
        lookahead = g
        if "exp_avg_diff" in state:
            d = jnp.where(t > 1, g - state["previous_grad"], 0)
            n = new["exp_avg_diff"] = b3 * state["exp_avg_diff"] + (1 - b3) * d
            new["previous_grad"] = g
            numerator = numerator + b3 * n
            lookahead = g + b3 * d

        v = state["exp_avg_sq"]
        square = lookahead * lookahead
        target = square
        if not is_frozen_at(c, 1.0):
            yogi = v + jnp.sign(square - v) * square
            target = c * square + (1 - c) * yogi
        v = new["exp_avg_sq"] = b2 * v + (1 - b2) * target
        if "mean_exp_avg_sq" in state:
            mean = state["mean_exp_avg_sq"]
            mean = new["mean_exp_avg_sq"] = mean + (v - mean) / t
            v = rho * v + (1 - rho) * mean
        return numerator / (root(v / (1 - b2**t)) + eps), new

    def sign(state: Buffers, g: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """sign(u_t): Lion."""
        momentum = state["lion_exp_avg"]
        u = kappa1 * momentum + (1 - kappa1) * g
        return jnp.sign(u), {"lion_exp_avg": kappa2 * momentum + (1 - kappa2) * g}

    return Family(_COEFFICIENTS, _buffers, update)


def _buffers(q: Values) -> tuple[str, ...]:
    names: list[str] = []
    if not is_frozen_at(q["gamma"], 0.0):
        names += ["exp_avg", "exp_avg_sq"]
        if not is_frozen_at(q["rho"], 1.0):
            names += ["mean_exp_avg_sq"]
        if not is_frozen_at(q["b3"], 0.0):
            names += ["exp_avg_diff", "previous_grad"]
    if not is_frozen_at(q["gamma"], 1.0):
        names += ["lion_exp_avg"]
    return tuple(names)


def _beta(name: str, default: float, box: tuple[float, float], hyper_lr: float, **kwargs: Any) -> Coefficient:
    return Coefficient(name, default, box, hyper_lr, domain=(0.0, BELOW_ONE), **kwargs)


def _weight(name: str, frozen_at: tuple[float, ...]) -> Coefficient:
    return Coefficient(name, 1.0, (0.0, 1.0), 0.1, domain=(0.0, 1.0), frozen_at=frozen_at)


_COEFFICIENTS = (
    _beta("b1", 0.9, (0.01, 0.99), 5e-4),
    # Frozen by default: learning β2 cancels the gain of the others.
    _beta("b2", 0.999, (0.5, 0.999), 0.0),
    _beta("b3", 0.0, (0.0, 0.99), 0.1, frozen_at=(0.0,)),
    _weight("rho", frozen_at=(1.0,)),
    _weight("c", frozen_at=(1.0,)),
    _weight("gamma", frozen_at=(0.0, 1.0)),
)
