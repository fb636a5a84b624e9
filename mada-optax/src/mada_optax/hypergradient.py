"""The derivative of one optimizer step with respect to the coefficients of its family.

With everything of step t-1 held constant, x_{t+1} = (1 - η_t λ) x_t - η_t Δ_t(q_t) and therefore

    h_t = ∂f(x_{t+1})/∂q_t = -η_t ⟨g_{t+1}, ∂Δ_t/∂q_t⟩ = -η_t ∂/∂q_t ⟨g_{t+1}, Δ_t(q_t)⟩.

The last form is what is computed: g_{t+1} pulled back through Δ_t to a handful of numbers (MADA, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mada_optax.family import Buffers, Family

Step = tuple[jax.Array, dict[str, jax.Array]]


def take_step(family: Family, state: Buffers, grad: jax.Array, q: Mapping[str, Any], step: jax.Array) -> Step:
    """Direction and new buffers of one array, in the dtype of its buffers."""
    dtype = grad.dtype
    scalars = {name: value.astype(dtype) if isinstance(value, jax.Array) else value for name, value in q.items()}
    direction, new = family.update(state, grad, scalars, step.astype(dtype))
    return direction.astype(dtype), {name: value.astype(dtype) for name, value in new.items()}


def align(
    family: Family,
    states: Sequence[Buffers],
    grads: Sequence[jax.Array],
    next_grads: Sequence[jax.Array],
    factors: jax.Array,
    q: Mapping[str, Any],
    learned: Sequence[str],
    step: jax.Array,
) -> jax.Array:
    """∂/∂q ⟨g_{t+1}, Δ_t(q)⟩, summed over all arrays with a factor for each.

    Args:
        family: whose update is differentiated.
        states: buffers of each array before step t.
        grads: g_t of each array, in the dtype of its buffers.
        next_grads: g_{t+1} of each array, in the same dtype.
        factors: one for each array; -η_t makes the hypergradient of the sum.
        q: coefficients of step t, scalars, or floats where they are special.
        learned: names of the coefficients to differentiate by.
        step: t.

    Returns:
        Shape ``(len(learned),)``, in the order of ``learned``.
    """
    values = jnp.stack([q[name] for name in learned])
    total = jnp.zeros_like(values)
    for state, grad, next_grad, factor in zip(states, grads, next_grads, factors, strict=True):
        _, pull_back = jax.vjp(_direction_of(family, state, grad, q, learned, step), values)
        total = total + factor * pull_back(next_grad)[0]
    return total


def _direction_of(
    family: Family, state: Buffers, grad: jax.Array, q: Mapping[str, Any], learned: Sequence[str], step: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    def direction(values: jax.Array) -> jax.Array:
        return take_step(family, state, grad, {**q, **dict(zip(learned, values, strict=True))}, step)[0]

    return direction
