"""Gradient transformations for any family, which learn the family's coefficients while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mada_optax.coefficients import Bounds, CoefficientSettings, HyperLR, LearningRule, Number, resolve_settings
from mada_optax.family import Buffers, Family
from mada_optax.hypergradient import align, take_step

# What learning changes in a state.
_LEARNED = ("coefficients", "hypergradient", "hyper_momentum", "skipped")
Mask = Any | Callable[[optax.Params], Any]


class FamilyState(NamedTuple):
    """State of :func:`scale_by_family`.

    While coefficients are learned, ``buffers`` are those before the last step and ``pending_grad`` is its gradient:
    the last step is differentiated when the next gradient arrives.

    Args:
        count: number of steps so far.
        coefficients: by name, as they were used in the last step.
        hypergradient: the latest one that was taken, before clipping, in the order of the family's coefficients.
        hyper_momentum: b, in the same order.
        skipped: how many hypergradients were not finite and therefore changed nothing.
        previous_rate: learning rate of each array in the last step.
        buffers: by name, each a tree like the parameters.
        pending_grad: a tree like the parameters; None where nothing is learned.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    coefficients: dict[str, jax.Array]
    hypergradient: jax.Array
    hyper_momentum: jax.Array
    skipped: jax.Array
    previous_rate: jax.Array
    buffers: dict[str, optax.Updates]
    pending_grad: optax.Updates | None


def scale_by_family(
    family: Family,
    learning_rate: optax.ScalarOrSchedule,
    *,
    start: Mapping[str, Number] | None = None,
    hyper_lr: HyperLR = None,
    hyper_momentum: Number = 0.0,
    hyper_clip: Number = 10.0,
    hyper_warmup: int | jax.Array = 50,
    hyper_every: int | jax.Array = 1,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turn gradients into the directions Δ_t of a family whose coefficients are learned.

    The directions are not multiplied by the learning rate, as with every ``scale_by_`` of optax. The hypergradient
    -η ⟨g₊, ∂Δ/∂q⟩ needs it all the same: give the one that follows in the chain. :func:`hypergradient_optimizer` does.

    ``update`` takes two extra arguments. ``update_scale``: by what later transformations multiply the updates beside
    the learning rate, a number or a tree of them; :func:`learned_scale` passes it. ``hyper_grad_scale``: by what to
    multiply the hypergradient, how many times as long the gradients were before they were clipped.

    Args:
        family, learning_rate, start, hyper_lr, hyper_momentum, hyper_clip, hyper_warmup, hyper_every, bounds: as in
            :func:`hypergradient_optimizer`.

    Returns:
        The transformation, whose state is a ``FamilyState``.

    >>> from mada_optax import mada_family
    >>> tx = scale_by_family(mada_family(), learning_rate=0.1, hyper_lr=0.0)
    >>> direction, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> direction.round(3), sorted(state.buffers)
    (Array([1., 1.], dtype=float32), ['exp_avg', 'exp_avg_sq'])
    """
    settings = resolve_settings(family, start or {}, hyper_lr, bounds)
    rule = LearningRule(hyper_momentum, hyper_clip, hyper_warmup, hyper_every)
    learned = settings.learned

    def init(params: optax.Params) -> FamilyState:
        number = jnp.zeros((), _number_dtype())
        # Copies: what optax.inject_hyperparams hands over is in its own state as well, and a step may donate both.
        coefficients = {name: jnp.array(value, number.dtype) for name, value in settings.start.items()}
        return FamilyState(
            count=jnp.zeros((), jnp.int32),
            coefficients=coefficients,
            hypergradient=jnp.zeros(len(coefficients), number.dtype),
            hyper_momentum=jnp.zeros(len(coefficients), number.dtype),
            skipped=jnp.zeros((), jnp.int32),
            previous_rate=jnp.zeros(len(jax.tree.leaves(params)), number.dtype),
            buffers={name: _zeros(params) for name in family.buffers({**coefficients, **settings.special})},
            pending_grad=_zeros(params) if learned else None,
        )

    def update(
        updates: optax.Updates,
        state: FamilyState,
        params: optax.Params | None = None,
        *,
        update_scale: Any = 1.0,
        hyper_grad_scale: Number = 1.0,
        **extra_args: Any,  # noqa: ARG001 (for other transformations)
    ) -> tuple[optax.Updates, FamilyState]:
        leaves: list[jax.Array] = jax.tree.leaves(updates)
        tree: Any = jax.tree.structure(updates)
        grads = [leaf.astype(_wide(leaf)) for leaf in leaves]
        buffers = _split(state.buffers, tree)
        if learned:
            pending = tree.flatten_up_to(state.pending_grad)
            q = {**state.coefficients, **settings.special}
            last = jnp.maximum(state.count, 1)  # before the first step, what is computed is not used
            factors = -state.previous_rate * hyper_grad_scale
            numbers = {name: getattr(state, name) for name in _LEARNED}

            def learn() -> dict[str, Any]:
                hypergradient = align(family, buffers, pending, grads, factors, q, learned, last)
                return _learn(settings, rule, state, hypergradient)

            moved = jax.lax.cond(rule.due(state.count), learn, lambda: numbers)
            advanced = [take_step(family, own, grad, q, last)[1] for own, grad in zip(buffers, pending, strict=True)]
            # The second term always holds. It puts the hypergradient first: else XLA copies the buffers.
            begun = (state.count > 0) & (moved["skipped"] >= 0)
            buffers = [
                {name: jnp.where(begun, new[name], old[name]) for name in old}
                for old, new in zip(buffers, advanced, strict=True)
            ]
            state = state._replace(**moved)
        coefficients = _in_use(settings, state.coefficients)
        count = optax.safe_increment(state.count)
        steps = [
            take_step(family, own, grad, {**coefficients, **settings.special}, count)
            for own, grad in zip(buffers, grads, strict=True)
        ]
        targets = leaves if params is None else tree.flatten_up_to(params)
        directions = [direction.astype(target.dtype) for (direction, _), target in zip(steps, targets, strict=True)]
        kept = buffers if learned else [new for _, new in steps]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new_state = state._replace(
            count=count,
            coefficients=coefficients,
            previous_rate=_rates(rate, update_scale, tree, state.previous_rate.dtype),
            buffers={name: tree.unflatten([own[name] for own in kept]) for name in state.buffers},
            pending_grad=tree.unflatten(grads) if learned else None,
        )
        return tree.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def hypergradient_optimizer(
    family: Family,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
    *,
    start: Mapping[str, Number] | None = None,
    hyper_lr: HyperLR = None,
    hyper_momentum: Number = 0.0,
    hyper_clip: Number = 10.0,
    hyper_warmup: int | jax.Array = 50,
    hyper_every: int | jax.Array = 1,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Optimize parameters by a family's update, and the family's coefficients by their hypergradient.

    At each step, for all parameters together: one hypergradient, one step of the coefficients, then the step of the
    parameters with the new coefficients. Buffers are float32, and float64 for float64 parameters. Use
    ``optax.partition`` to learn one set of coefficients for each part of a model.

    Args:
        family: the update rule, such as :func:`mada_family`.
        learning_rate: η, a number or a schedule.
        weight_decay: decoupled weight decay λ, multiplied by the learning rate.
        mask: which parameters decay, as in ``optax.adamw``: a tree of booleans, or a function from parameters to one.
        start: initial values of coefficients, by name; what is not named starts at the family's default.
        hyper_lr: step sizes α of the coefficients. None: the family's defaults. A number: one for all. A mapping from
            name to number: what is not named is frozen. 0.0: nothing is learned.
        hyper_momentum: momentum μ of the coefficients' gradient descent.
        hyper_clip: each component of the hypergradient is cut to [-hyper_clip, hyper_clip].
        hyper_warmup: number of steps before the coefficients begin to move.
        hyper_every: the hypergradient is taken each ``hyper_every``-th step.
        bounds: boxes (low, high) of coefficients by name. The others keep the family's.

    Returns:
        The transformation. ``optax.tree_utils.tree_get(state, "coefficients")`` reads the coefficients.

    Raises:
        ValueError: an argument is out of its range, or a name unknown.

    >>> from mada_optax import mada_family
    >>> tx = hypergradient_optimizer(mada_family(), 0.1, hyper_lr={"rho": 0.1}, hyper_warmup=0)
    >>> params = jnp.ones(3)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(2 * params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(optax.tree_utils.tree_get(state, "rho") <= 1.0)
    True
    """
    return optax.chain(
        scale_by_family(
            family,
            learning_rate,
            start=start,
            hyper_lr=hyper_lr,
            hyper_momentum=hyper_momentum,
            hyper_clip=hyper_clip,
            hyper_warmup=hyper_warmup,
            hyper_every=hyper_every,
            bounds=bounds,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _learn(
    settings: CoefficientSettings, rule: LearningRule, state: FamilyState, hypergradient: jax.Array
) -> dict[str, Any]:
    """What learning changes in a state, by the hypergradient of the coefficients that are learned."""
    names = list(settings.start)  # a dict that has been traced is in another order
    values = jnp.stack([state.coefficients[name] for name in names])
    learned = jnp.array([names.index(name) for name in settings.learned])
    whole = jnp.zeros_like(values).at[learned].set(hypergradient)
    step_sizes = jnp.stack([jnp.asarray(settings.hyper_lr[name], values.dtype) for name in names])
    low, high = (jnp.array([settings.bounds[name][end] for name in names], values.dtype) for end in (0, 1))
    values, momentum, used = rule.learn(values, state.hyper_momentum, whole, step_sizes, low, high)
    skipped = jnp.where(used, state.skipped, optax.safe_increment(state.skipped))
    coefficients = dict(zip(names, values, strict=True))
    return dict(zip(_LEARNED, (coefficients, whole, momentum, skipped), strict=True))


def _in_use(settings: CoefficientSettings, coefficients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Coefficients for the next step: those that are frozen are what the user says now."""
    return {
        name: value if name in settings.learned else jnp.asarray(settings.start[name], value.dtype)
        for name, value in coefficients.items()
    }


def _split(buffers: Mapping[str, optax.Updates], tree: Any) -> list[Buffers]:
    """Buffers by name, for each array of the tree."""
    columns = {name: tree.flatten_up_to(value) for name, value in buffers.items()}
    return [{name: column[index] for name, column in columns.items()} for index in range(tree.num_leaves)]


def _rates(rate: Number, update_scale: Any, tree: Any, dtype: Any) -> jax.Array:
    """The learning rate of each array, where later transformations multiply the updates as well."""
    is_number = isinstance(update_scale, (int, float, jax.Array)) and tree != jax.tree.structure(update_scale)
    factors = [update_scale] * tree.num_leaves if is_number else tree.flatten_up_to(update_scale)
    return jnp.array([jnp.asarray(rate * factor, dtype) for factor in factors], dtype)


def _number_dtype() -> Any:
    """Return the dtype of coefficients: the widest that there is."""
    return jnp.result_type(float)


def _wide(array: Any) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


def _zeros(params: optax.Params) -> optax.Updates:
    return jax.tree.map(lambda param: jnp.zeros_like(param, dtype=_wide(param)), params)
