"""How a scale is learned: the pure rule behind :func:`mada_optax.learned_scale`.

One number κ multiplies the whole way gone, x = x_1 - κ W. With W held constant, the derivative of the loss by log κ is
-κ ⟨g, W⟩ exactly. The rule moves log κ against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of the running means of h and h², as Adam's defaults but with a shorter memory.
MEAN_DECAY = 0.9
SQUARE_DECAY = 0.99
# Of the running mean of h² that says how much of h is left.
RECENT_DECAY = 0.95


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Args:
        start: scale at which it begins, far below any useful learning rate; at most 1. Adaptive steps that are far too
            long at first harm a network for good, and no hypergradient tells the way back.
        climb: largest change of log κ in one step until the scale is first asked to fall.
        rate: largest change of log κ in one step from then on.
        swing: share with which swings of the way about its running mean count. They are gone once the learning rate
            has fallen, so the loss during training shows them too large.
        window: decay of that running mean.
        steps: number of steps after which the scale is held.
        least_share: the scale is held earlier where the schedule has fallen below this share of its peak.
        margin: factor by which the scale is multiplied when it is held, see :func:`held_scale`.
        bounds: closed interval in which the scale stays.

    Raises:
        ValueError: a setting is out of its range.

    >>> SearchSettings().margin, ADAPTIVE.margin
    (1.5, 2.5)
    """

    start: float = 1e-3
    climb: float = 0.1
    rate: float = 0.1
    swing: float = 0.5
    window: float = 0.97
    steps: int = 150
    least_share: float = 0.5
    margin: float = 1.5
    bounds: tuple[float, float] = (1e-8, 10.0)

    def __post_init__(self) -> None:
        low, high = self.bounds
        allowed = {
            "start": (max(low, 0.0) < self.start <= 1.0, "above the lower bound and at most 1"),
            "climb": (0.0 < self.climb <= 1.0, "in (0, 1]"),
            "rate": (0.0 < self.rate <= 1.0, "in (0, 1]"),
            "swing": (0.0 <= self.swing <= 1.0, "in [0, 1]"),
            "window": (0.0 <= self.window < 1.0, "in [0, 1)"),
            "steps": (isinstance(self.steps, int) and self.steps > 0, "a positive whole number"),
            "least_share": (0.0 <= self.least_share <= 1.0, "in [0, 1]"),
            "margin": (0.0 < self.margin < math.inf, "a positive number"),
            "bounds": (0.0 < low < high < math.inf, "two positive numbers, the lower one first"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")


ADAPTIVE = SearchSettings(margin=2.5, bounds=(1e-8, 1.0))
"""For Adam and its kin. What the search finds is a smaller part of the best rate than for orthogonalized steps."""


class ScaleState(NamedTuple):
    """What is known of a scale during the search.

    Args:
        log_value: log κ.
        mean: Σ 0.1·0.9^k h_{t-k}.
        square: Σ 0.01·0.99^k h²_{t-k}.
        taken: how many hypergradients were used.
        climbing: whether the scale has never been asked to fall.
        waiting: hypergradient of the last step, used at the next one.
        recent: Σ 0.05·0.95^k h²_{t-k}.
    """

    log_value: jax.Array
    mean: jax.Array
    square: jax.Array
    taken: jax.Array
    climbing: jax.Array
    waiting: jax.Array
    recent: jax.Array


def start(settings: SearchSettings) -> ScaleState:
    """What is known before the first step. No two entries are one array, so a step may donate all of them."""
    dtype = jnp.result_type(float)
    return ScaleState(
        log_value=jnp.asarray(math.log(settings.start), dtype),
        mean=jnp.zeros((), dtype),
        square=jnp.zeros((), dtype),
        taken=jnp.zeros((), jnp.int32),
        climbing=jnp.asarray(True),
        waiting=jnp.zeros((), dtype),
        recent=jnp.zeros((), dtype),
    )


def learn(settings: SearchSettings, state: ScaleState) -> ScaleState:
    """One step of log κ, by the mean of the hypergradient over its root mean square, cut to [-1, 1].

    The quotient has no unit: scaling the loss, the parameters or the schedule changes nothing. A hypergradient that is
    0 or not finite is passed over.

    Args:
        settings: of the search.
        state: before the step. ``waiting`` is ∂f/∂log κ.
    """
    h = state.waiting
    taken = state.taken + 1
    mean = MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * h
    square = SQUARE_DECAY * state.square + (1 - SQUARE_DECAY) * h**2
    recent = RECENT_DECAY * state.recent + (1 - RECENT_DECAY) * h**2
    root = jnp.sqrt(square / (1 - SQUARE_DECAY**taken))
    slope = jnp.clip(mean / (1 - MEAN_DECAY**taken) / root, -1.0, 1.0)
    climbing = state.climbing & (slope <= 0.0)
    lowest, highest = map(math.log, settings.bounds)
    moved = state.log_value - jnp.where(climbing, settings.climb, settings.rate) * slope
    after = ScaleState(jnp.clip(moved, lowest, highest), mean, square, taken, climbing, jnp.zeros_like(h), recent)
    passed = state._replace(waiting=jnp.zeros_like(h))
    return choose((h != 0.0) & jnp.isfinite(h), after, passed)


def held_scale(settings: SearchSettings, state: ScaleState) -> jax.Array:
    """Return the scale that is held when the search ends: κ times the margin, within the bounds.

    The margin makes up for the noise of gradients. It is taken to the power of what is left of the hypergradients:
    their root mean square over some 20 steps, as a share of that over some 100 steps, at most 1.
    """
    recent = state.recent / (1 - RECENT_DECAY**state.taken)
    square = state.square / (1 - SQUARE_DECAY**state.taken)
    liveliness = jnp.where(state.recent > 0.0, jnp.minimum(jnp.sqrt(recent / square), 1.0), 1.0)
    return jnp.minimum(jnp.exp(state.log_value) * settings.margin**liveliness, settings.bounds[1])


def choose(condition: jax.Array, one: ScaleState, other: ScaleState) -> ScaleState:
    """Return ``one`` where the condition holds, else ``other``."""
    return ScaleState(*(jnp.where(condition, a, b) for a, b in zip(one, other, strict=True)))
