"""The derivative of one optimizer step with respect to the coefficients of its family.

With everything of step t-1 held constant, x_{t+1} = (1 - η_t λ) x_t - η_t Δ_t(q_t) and therefore

    h_t = ∂f(x_{t+1})/∂q_t = -η_t ⟨g_{t+1}, ∂Δ_t/∂q_t⟩ = -η_t ∂/∂q_t ⟨g_{t+1}, Δ_t(q_t)⟩.

The last form is what is computed: g_{t+1} pulled back through Δ_t to a handful of numbers (MADA, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mada_optax.family import Buffers, Family

PIECE = 1 << 15  # elements
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
        q: coefficients of step t, scalars, or floats where they are frozen at one of ``frozen_at``.
        learned: names of the coefficients to differentiate by.
        step: t.

    Returns:
        Shape ``(len(learned),)``, in the order of ``learned``.
    """
    values = jnp.stack([q[name] for name in learned])

    def align_array(state: Buffers, grad: jax.Array, next_grad: jax.Array) -> jax.Array:
        def direction(values: jax.Array) -> jax.Array:
            return take_step(family, state, grad, {**q, **dict(zip(learned, values, strict=True))}, step)[0]

        _, pull_back = jax.vjp(direction, values)
        aligned: jax.Array = pull_back(next_grad)[0]
        return aligned

    total = jnp.zeros_like(values)
    for state, grad, next_grad, factor in zip(states, grads, next_grads, factors, strict=True):
        # Arrays that are sharded over devices would be gathered to be cut.
        if family.elementwise and grad.size >= 2 * PIECE and jax.device_count() == 1:
            aligned = jax.lax.platform_dependent(
                state, grad, next_grad, cpu=partial(_sum_over_pieces, align_array), default=align_array
            )
        else:
            aligned = align_array(state, grad, next_grad)
        total = total + factor * aligned
    return total


def _sum_over_pieces(function: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """The sum of a function over pieces of arrays that fit the cache.

    XLA fuses all of the derivative into one loop on accelerators. On the CPU it does not, and writes some thirty arrays
    of the size of the parameter between its loops.
    """
    tree: Any = jax.tree.structure(arrays)
    flat: list[jax.Array] = [leaf.reshape(-1) for leaf in jax.tree.leaves(arrays)]
    count = flat[0].size // PIECE

    def at(index: Any, size: int) -> jax.Array:
        return function(*tree.unflatten([jax.lax.dynamic_slice(leaf, (index * PIECE,), (size,)) for leaf in flat]))

    rest = flat[0].size - count * PIECE
    first = at(count, rest) if rest else jnp.zeros_like(jax.eval_shape(lambda: at(0, PIECE)))
    total: jax.Array = jax.lax.fori_loop(0, count, lambda index, total: total + at(index, PIECE), first)
    return total
