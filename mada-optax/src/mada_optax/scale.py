"""The learned scale: a learning rate that is found in the first steps and then held, for any optax transformation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from mada_optax.rule import ADAPTIVE, ScaleState, SearchSettings, choose, held_scale, learn, start
from mada_optax.way import Trail, Way, begin, collect, trails

LEAST_STEPS = 30
"""Steps after which the search may end because the schedule has fallen."""
Labels = Any | Callable[[optax.Params], Any]
T = TypeVar("T")


class LearnedScaleState(NamedTuple):
    """State of :func:`learned_scale`.

    Args:
        count: number of steps so far, of which the schedule is a function.
        search_steps: steps of the search so far; those at a learning rate of 0 do not count.
        searching: whether the scale is still being learned.
        peak: highest value of the schedule so far.
        learned_rate: κ by label, as it was used in the last step: the learning rate at the peak of the schedule.
        search: what is known of each scale, by label.
        way: None where the scales are held from the start, or :func:`end_search` has freed it.
        base_state: of the wrapped transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    search_steps: jax.Array
    searching: jax.Array
    peak: jax.Array
    learned_rate: dict[str, jax.Array]
    search: dict[str, ScaleState]
    way: Way | None
    base_state: optax.OptState


def learned_scale(
    base: optax.GradientTransformation,
    schedule: optax.ScalarOrSchedule = 1.0,
    *,
    per: Labels | None = None,
    settings: SearchSettings | Mapping[str, SearchSettings] = ADAPTIVE,
    held: float | Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Find the learning rate of any optax transformation during its first steps, and then hold it.

    Make the base with a learning rate of 1, and give the schedule to the wrapper. Only the shape of the schedule
    counts::

        tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, 1000), weight_decay=0.1)
        tx = learned_scale(
            optax.adamw(1.0, weight_decay=0.1), optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)
        )

    With u_t the base's step, weight decay included::

        η_t = lr_t / max_{i≤t} lr_i                 the schedule
        W_t = Σ_{i≤t} η_i u_i                       the way gone, in units of the schedule
        x_{t+1} = x_1 - κ W_t                       κ scales all of it: a step that was too large is taken back
        h_t = -κ ⟨g_{t+1}, σ W_t + (1-σ) W̄_t⟩       W̄: running mean of W; σ = 1/2
        log κ ← log κ - a mean(h)/rms(h)            used one step later; see :class:`SearchSettings` for a

    After 150 steps, or after 30 when the schedule has fallen below half of its peak, κ is multiplied by a margin and
    held. From then on the base is itself, at a learning rate of κ times the schedule.

    During the search the state holds 6 bytes more for each parameter. A jitted step cannot free memory: call
    :func:`end_search` on the state after the search. The wrapper moves the parameters itself, so nothing may follow it
    in a chain; put clipping before it or into the base.

    Args:
        base: the transformation to wrap, at a learning rate of 1.
        schedule: a function of the number of steps so far, or a number.
        per: labels of parameters, as in ``optax.partition``: a tree of strings, or a function from parameters to one.
            Parameters of one label share a scale. None: all share one, ``"all"``.
        settings: of the search; or a mapping from labels to settings. Default: ``ADAPTIVE``, for Adam and its kin. Give
            ``SearchSettings()`` for orthogonalized steps and SGD.
        held: scales that are held from the start, instead of a search: a number, or a mapping from labels.

    Returns:
        The transformation. ``optax.tree_utils.tree_get(state, "learned_rate")`` reads the rates by label.

    Raises:
        ValueError: a held scale is not a positive number; at ``init``: a label has no settings or no held scale.

    >>> import optax
    >>> tx = learned_scale(optax.adamw(1.0))
    >>> params = jnp.array([3.0, -2.0])
    >>> state, step = tx.init(params), jax.jit(tx.update)
    >>> for _ in range(160):
    ...     updates, state = step(2 * params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(state.searching), int(state.search_steps), bool(0.01 < state.learned_rate["all"] < 1.0)
    (False, 150, True)
    """
    base = optax.with_extra_args_support(base)
    for value in held.values() if isinstance(held, Mapping) else () if held is None else (held,):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise ValueError(f"held must be a positive number, or a mapping to positive numbers, got {held!r}")

    def init(params: optax.Params) -> LearnedScaleState:
        labels = ["all"] if per is None else sorted(set(_labels(per, params)))
        search = {label: start(_of_label(settings, label, "settings")) for label in labels}
        rates = {
            label: jnp.exp(search[label].log_value) if held is None else _of_label(held, label, "held")
            for label in labels
        }
        number = jnp.zeros((), jnp.result_type(float))
        return LearnedScaleState(
            count=jnp.zeros((), jnp.int32),
            search_steps=jnp.zeros((), jnp.int32),
            searching=jnp.asarray(held is None),
            peak=number,
            learned_rate={label: jnp.asarray(rate, number.dtype) for label, rate in rates.items()},
            search=search,
            way=begin(params) if held is None else None,
            base_state=base.init(params),
        )

    def update(
        updates: optax.Updates, state: LearnedScaleState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LearnedScaleState]:
        if params is None:
            raise ValueError("learned_scale moves the parameters: call update(grads, state, params)")
        rate = jnp.asarray(schedule(state.count) if callable(schedule) else schedule, state.peak.dtype)
        peak = jnp.where(jnp.isfinite(rate), jnp.maximum(state.peak, rate), state.peak)
        share = rate / jnp.where(peak > 0.0, peak, 1.0)
        before = state.learned_rate
        state = state._replace(count=optax.safe_increment(state.count), peak=peak)
        tree: Any = jax.tree.structure(params)
        labels = _labels(per, params)
        paths, places = None, params
        if (way := state.way) is not None:
            state, advancing = _advance(settings, state, rate)
            pairs = [(before[label], state.learned_rate[label]) for label in labels]
            paths = trails(way, params, pairs, advancing)
            state = _measure(settings, state, before, paths, tree.flatten_up_to(updates), labels)
            places = tree.unflatten([trail.place() for trail in paths])
        scales = [state.learned_rate[label] * share for label in labels]
        # A number where there is one scale: parts of a partitioned base do not see the tree of all parameters.
        update_scale = scales[0] if len(state.learned_rate) == 1 and scales else tree.unflatten(scales)
        base_updates, base_state = base.update(
            updates, state.base_state, places, **{**extra_args, "update_scale": update_scale}
        )
        steps = tree.flatten_up_to(base_updates)
        if paths is None:
            moves = [scale.astype(step.dtype) * step for scale, step in zip(scales, steps, strict=True)]
        else:
            moves = [trail.follow(step, share) for trail, step in zip(paths, steps, strict=True)]
            way = collect(paths, params)
        return tree.unflatten(moves), state._replace(way=way, base_state=base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def end_search(state: T) -> T:
    """Free what a search has kept of the parameters, where it has ended.

    A jitted step cannot change the shape of its state, so :func:`learned_scale` keeps these trees until this function
    takes them out. A search that is under way is left as it is. The next step is compiled anew.

    Args:
        state: of any transformation that has :func:`learned_scale` in it; not traced.

    Returns:
        The state without the trees.

    >>> import optax
    >>> tx = learned_scale(optax.sgd(1.0), held=0.1)
    >>> end_search(tx.init(jnp.ones(2))).way is None
    True
    """

    def free(node: Any) -> Any:
        if not isinstance(node, LearnedScaleState):
            return node
        return node._replace(way=node.way if bool(node.searching) else None, base_state=end_search(node.base_state))

    return jax.tree.map(free, state, is_leaf=lambda node: isinstance(node, LearnedScaleState))  # type: ignore[no-any-return]


def _advance(
    settings: SearchSettings | Mapping[str, SearchSettings], state: LearnedScaleState, rate: jax.Array
) -> tuple[LearnedScaleState, jax.Array]:
    """Learn from the hypergradients of the last step, end the search where it is time, and set the rates to use.

    Returns:
        The state, and whether the search takes a step now. It rests at a learning rate of 0.
    """
    of = {label: _of_label(settings, label, "settings") for label in state.search}
    active = state.searching & (rate != 0.0)
    fallen = rate < min(each.least_share for each in of.values()) * state.peak
    climbing = jnp.stack([scale.climbing for scale in state.search.values()]).any()
    enough = (state.search_steps >= LEAST_STEPS) & ~climbing
    ending = active & ((fallen & enough) | (state.search_steps >= max(each.steps for each in of.values())))
    advancing = active & ~ending
    search, rates = {}, {}
    for label, scale in state.search.items():
        moved = learn(of[label], scale)
        search[label] = choose(active, moved, scale)
        value = jnp.exp(moved.log_value)
        rates[label] = jnp.where(
            ending, held_scale(of[label], moved), jnp.where(advancing, value, state.learned_rate[label])
        )
    return state._replace(
        search=search,
        learned_rate=rates,
        searching=state.searching & ~ending,
        search_steps=jnp.where(advancing, optax.safe_increment(state.search_steps), state.search_steps),
    ), advancing


def _measure(
    settings: SearchSettings | Mapping[str, SearchSettings],
    state: LearnedScaleState,
    scales: Mapping[str, jax.Array],
    paths: Sequence[Trail],
    grads: Sequence[jax.Array],
    labels: Sequence[str],
) -> LearnedScaleState:
    """The state with the hypergradients of the ways that lead here at ``scales``, to be used at the next step."""
    search = dict(state.search)
    for label, scale in state.search.items():
        each = _of_label(settings, label, "settings")
        along = [
            trail.measure(grad, each.swing, each.window)
            for trail, grad, own in zip(paths, grads, labels, strict=True)
            if own == label
        ]
        h = -scales[label] * sum(part.astype(scale.waiting.dtype) for part in along)
        advancing = paths[0].advancing
        search[label] = scale._replace(waiting=jnp.where(advancing, h, scale.waiting))
    return state._replace(search=search)


def _labels(per: Labels | None, params: optax.Params) -> list[str]:
    """The label of each array."""
    if per is None:
        return ["all"] * len(jax.tree.leaves(params))
    labels = per(params) if callable(per) else per
    whole = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    return jax.tree.leaves(whole)


def _of_label(values: Any, label: str, argument: str) -> Any:
    if not isinstance(values, Mapping):
        return values
    if label not in values:
        raise ValueError(f"{argument} must have an entry for the label {label!r}, got {values!r}")
    return values[label]
