"""How a scale is learned: the pure rule behind :class:`mada_optim.LearnedScale`.

One number κ multiplies the whole way gone, x = x_1 - κ W. With W held constant, the derivative of the loss by log κ is
-κ ⟨g, W⟩ exactly. The rule moves log κ against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# Decays of the running means of h and h², as Adam's defaults but with a shorter memory.
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
        bounds: closed interval in which the scale stays. Where nothing holds it back, as with a reward that is
            certain, weight decay λ diverges once the held scale times λ exceeds 2.
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


@dataclass(frozen=True)
class ScaleState:
    """What is known of a scale: its logarithm, and running means of its hypergradient h and of h².

    Args:
        log_value: log κ.
        mean: Σ 0.1·0.9^k h_{t-k}.
        square: Σ 0.01·0.99^k h²_{t-k}.
        taken: how many hypergradients were used.
        climbing: whether the scale has never been asked to fall.
        recent: Σ 0.05·0.95^k h²_{t-k}.
    """

    log_value: float
    mean: float = 0.0
    square: float = 0.0
    taken: int = 0
    climbing: bool = True
    recent: float = 0.0

    @property
    def value(self) -> float:
        """The scale κ."""
        return math.exp(self.log_value)

    @property
    def liveliness(self) -> float:
        """Root mean square of h over some 20 steps, as a share of that over some 100 steps; at most 1."""
        if self.square == 0.0:  # before the first
            return 1.0
        recent = self.recent / (1 - RECENT_DECAY**self.taken)
        return min(1.0, math.sqrt(recent / (self.square / (1 - SQUARE_DECAY**self.taken))))


def learn(settings: SearchSettings, state: ScaleState, hypergradient: float) -> ScaleState:
    """One step of log κ, by the mean of the hypergradient over its root mean square, cut to [-1, 1].

    The quotient has no unit: scaling the loss, the parameters or the schedule changes nothing. A hypergradient that is
    0 or not finite, or whose square would be, is passed over.

    Args:
        settings: of the search.
        state: before the step.
        hypergradient: ∂f/∂log κ, up to a constant factor.

    >>> state = learn(SearchSettings(), ScaleState(math.log(1e-4)), -3.0)
    >>> round(math.log(state.value / 1e-4), 3), state.climbing
    (0.1, True)
    >>> learn(SearchSettings(), state, float("nan")) == state
    True
    """
    if not 0.0 < hypergradient * hypergradient < math.inf:
        return state
    taken = state.taken + 1
    mean = MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * hypergradient
    square = SQUARE_DECAY * state.square + (1 - SQUARE_DECAY) * hypergradient**2
    recent = RECENT_DECAY * state.recent + (1 - RECENT_DECAY) * hypergradient**2
    root = math.sqrt(square / (1 - SQUARE_DECAY**taken))
    slope = max(-1.0, min(1.0, mean / (1 - MEAN_DECAY**taken) / root))
    climbing = state.climbing and slope <= 0.0
    lowest, highest = map(math.log, settings.bounds)
    moved = state.log_value - (settings.climb if climbing else settings.rate) * slope
    return ScaleState(max(lowest, min(highest, moved)), mean, square, taken, climbing, recent)


def held_scale(settings: SearchSettings, state: ScaleState) -> float:
    """The scale that is held when the search ends: κ times the margin, within the bounds.

    The margin makes up for the noise of gradients, which lets the search settle below the best rate. Where training
    data are fit perfectly, the noise dies out, and with it the hypergradients. So the margin is taken to the power of
    what is left of them, :attr:`ScaleState.liveliness`.

    >>> noisy = ScaleState(math.log(1e-3), square=0.5, recent=0.9, taken=100)
    >>> dying_out = ScaleState(math.log(1e-3), square=0.5, recent=0.0005, taken=100)
    >>> [round(held_scale(ADAPTIVE, state), 5) for state in (noisy, dying_out)]
    [0.0025, 0.00102]
    """
    return min(state.value * math.pow(settings.margin, state.liveliness), settings.bounds[1])


def as_lively(state: ScaleState) -> ScaleState:
    """The state as if the hypergradients had kept their size: of those that were saved without ``recent``."""
    size = state.square / (1 - SQUARE_DECAY**state.taken) if state.taken else 0.0
    return replace(state, recent=size * (1 - RECENT_DECAY**state.taken))
