"""The way that parameters have gone, and its scalar product with the gradient.

With x_1 where the search began, a parameter lies at x = x_1 - κ W. For parameters in float32 and float64, W is kept,
and a change of κ moves x by it. In bfloat16 and float16 a small step is lost to rounding: there x_1 is kept as well,
and the parameter is put at x_1 - κ W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LOW_PRECISION = (jnp.bfloat16, jnp.float16)


class Way(NamedTuple):
    """What the search keeps of the parameters.

    Args:
        gone: W, a tree like the parameters, in float32, or float64 for float64 parameters.
        mean: W̄, the running mean of W, a tree in bfloat16.
        initial: x_1 of those parameters that are bfloat16 or float16.
    """

    gone: optax.Updates
    mean: optax.Updates
    initial: tuple[jax.Array, ...]


def begin(params: optax.Params) -> Way:
    """A way that begins where the parameters are."""
    return Way(
        gone=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32)), params),
        mean=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.bfloat16), params),
        initial=tuple(x.astype(jnp.float32) for x in jax.tree.leaves(params) if _is_low(x)),
    )


@dataclass
class Trail:
    """The way of one array, for one step of the search.

    Args:
        x: where the array is, at x_1 - κ W.
        gone: W.
        mean: W̄.
        initial: x_1 in float32, of an array in low precision, else None.
        scale: κ.
        new_scale: κ'.
        advancing: whether the search goes on in this step. If not, x, W and W̄ stay.
    """

    x: jax.Array
    gone: jax.Array
    mean: jax.Array
    initial: jax.Array | None
    scale: jax.Array
    new_scale: jax.Array
    advancing: jax.Array

    def __post_init__(self) -> None:
        self.scale, self.new_scale = (scale.astype(self.gone.dtype) for scale in (self.scale, self.new_scale))
        if self.initial is not None:
            # What others wrote into the array since the last step moves x_1.
            change = self.x - self._at(self.initial, self.scale, self.gone)
            self.initial = jnp.where(self.advancing, self.initial + change, self.initial)

    def measure(self, grad: jax.Array, swing: float, window: float) -> jax.Array:
        """⟨g, σ W + (1-σ) W̄⟩, with the new W̄."""
        average = self.mean.astype(self.gone.dtype)
        average = average + (1 - window) * (self.gone - average)
        self.mean = jnp.where(self.advancing, average.astype(self.mean.dtype), self.mean)
        return jnp.sum(grad.astype(self.gone.dtype) * (average + swing * (self.gone - average)))

    def place(self) -> jax.Array:
        """x_1 - κ' W, from where the optimizer takes its step."""
        if self.initial is not None:
            return jnp.where(self.advancing, self._at(self.initial, self.new_scale, self.gone), self.x)
        change = jnp.where(self.advancing, self.new_scale - self.scale, 0)
        return (self.x - change * self.gone).astype(self.x.dtype)

    def follow(self, step: jax.Array, share: jax.Array) -> jax.Array:
        """Add a step at a learning rate of 1, taken at a share of it, to W. Return how x moves to x_1 - κ' W."""
        share = share.astype(self.gone.dtype)
        before = self.gone
        self.gone = before - jnp.where(self.advancing, share, 0) * step
        if self.initial is None:
            change = jnp.where(self.advancing, self.new_scale - self.scale, 0)
            return (self.new_scale * share * step - change * before).astype(step.dtype)
        moved = self._at(self.initial, self.new_scale, self.gone) - self.x
        return jnp.where(self.advancing, moved, self.new_scale * share * step).astype(step.dtype)

    def _at(self, initial: jax.Array, scale: jax.Array, gone: jax.Array) -> jax.Array:
        return (initial - scale * gone).astype(self.x.dtype)


def trails(
    way: Way, params: optax.Params, scales: list[tuple[jax.Array, jax.Array]], advancing: jax.Array
) -> list[Trail]:
    """The way of each array; ``scales``: κ and κ' of each."""
    arrays: list[jax.Array] = jax.tree.leaves(params)
    tree: Any = jax.tree.structure(params)
    initial = iter(way.initial)
    return [
        Trail(x, gone, mean, next(initial) if _is_low(x) else None, scale, new_scale, advancing)
        for x, gone, mean, (scale, new_scale) in zip(
            arrays, tree.flatten_up_to(way.gone), tree.flatten_up_to(way.mean), scales, strict=True
        )
    ]


def collect(trails: list[Trail], params: optax.Params) -> Way:
    """What is kept of the trails."""
    tree: Any = jax.tree.structure(params)
    return Way(
        gone=tree.unflatten([trail.gone for trail in trails]),
        mean=tree.unflatten([trail.mean for trail in trails]),
        initial=tuple(trail.initial for trail in trails if trail.initial is not None),
    )


def _is_low(array: jax.Array) -> bool:
    return array.dtype in LOW_PRECISION
