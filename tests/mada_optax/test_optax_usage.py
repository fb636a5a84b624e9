"""What people build around transformations of optax works with these."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mada_optax
import numpy as np
import optax
import pytest
from mada_optax import SearchSettings, avgrad, end_search, learned_scale, mada, omada

ALL = {"b1": 5e-4, "b2": 5e-4, "b3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
LEARNING = {"hyper_lr": {"b1": 5e-3, "rho": 0.1}, "hyper_warmup": 2}
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.3, -0.1])}
get = optax.tree_utils.tree_get


def gradient(params: Any, step: Any) -> Any:
    return jax.tree.map(lambda x: (x * (1 + 0.5 * jnp.sin(3.0 * step))).astype(x.dtype), params)


def run(tx: optax.GradientTransformation, steps: int, params: Any = None, state: Any = None) -> tuple[Any, Any, int]:
    """Parameters and state after some compiled steps, and how often the step was traced."""
    params = PARAMS if params is None else params
    traces = 0

    # A new state is donated, as people do who save memory: no two of its entries may be one array.
    @partial(jax.jit, donate_argnums=(1,) if state is None else ())
    def step(params: Any, state: Any, index: jax.Array) -> tuple[Any, Any]:
        nonlocal traces
        traces += 1
        updates, state = tx.update(gradient(params, index), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    for index in range(steps):
        params, state = step(params, state, jnp.float32(index))
    return params, state, traces


def same(one: Any, other: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance})


OPTIMIZERS = {
    "mada": mada(optax.cosine_decay_schedule(1e-2, 10), hyper_lr=ALL, hyper_warmup=1),
    "avgrad": avgrad(1e-2),
    "learned_scale": learned_scale(optax.adamw(1.0), settings=SearchSettings(steps=3)),
    "omada": omada(matrices={"w": True, "b": False}, settings=SearchSettings(steps=3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_traced_once(name: str) -> None:
    """Through warm-up, learning, and the end of a search; so the state keeps its structure and dtypes."""
    params, _, traces = run(OPTIMIZERS[name], 6)
    assert traces == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def test_coefficients_are_found_in_the_state() -> None:
    _, state, _ = run(optax.chain(optax.clip_by_global_norm(1.0), mada(1e-2, **LEARNING)), 5)
    assert float(get(state, "rho")) == float(get(state, "coefficients")["rho"]) < 1.0
    assert float(get(state, "b1")) != 0.9
    assert float(get(state, "b2")) == np.float32(0.999)


def test_clipping_comes_first() -> None:
    """The hypergradient sees the clipped gradient, unless it is told how much was cut."""
    params, state, _ = run(optax.chain(optax.clip_by_global_norm(1e-3), mada(1e-2, **LEARNING)), 4)

    def shorten(grads: Any, _: Any) -> Any:
        norm = optax.tree_utils.tree_norm(grads)
        return jax.tree.map(lambda grad: grad / norm * 1e-3, grads)

    same(params, run(optax.chain(optax.stateless(shorten), mada(1e-2, **LEARNING)), 4)[0], atol=1e-6)
    step = jax.jit(mada(1e-2, **LEARNING).update)
    h = [get(step(PARAMS, state[1], params, hyper_grad_scale=scale)[1], "hypergradient") for scale in (1.0, 3.0)]
    same(3 * h[0], h[1], rtol=1e-6)
    assert abs(h[0]).max() > 0


def test_inject_hyperparams() -> None:
    """Numbers become arrays; what is frozen follows them from step to step."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    injected = optax.inject_hyperparams(mada, static_args=("b3", "c", "gamma"))(schedule, eps=1e-8, **LEARNING)
    params, state, traces = run(injected, 5)
    expected, plain, _ = run(mada(schedule, **LEARNING), 5)
    assert traces == 1
    same(params, expected, atol=1e-6)
    same(get(state, "coefficients"), get(plain, "coefficients"), atol=1e-6)
    state.hyperparams["b2"] = jnp.float32(0.5)
    _, state, _ = run(injected, 1, params, state)
    assert float(get(state, "coefficients")["b2"]) == 0.5
    everything = optax.inject_hyperparams(mada)(1e-2, hyper_lr=0.0)
    same(run(everything, 3)[0], run(optax.adamw(1e-2, weight_decay=1e-2), 3)[0], atol=1e-6)


def test_partition() -> None:
    """Each part has a set of coefficients of its own; multi_transform is another name of partition."""
    assert optax.multi_transform is optax.partition
    tx = optax.partition({"w": mada(1e-2, **LEARNING), "b": avgrad(1e-3)}, {"w": "w", "b": "b"})
    params, state, _ = run(tx, 5)
    alone, own, _ = run(mada(1e-2, **LEARNING), 5, {"w": PARAMS["w"]})
    same(params["w"], alone["w"], atol=1e-7)
    assert float(get(state.inner_states["w"], "rho")) == pytest.approx(float(get(own, "rho")))
    assert float(get(state.inner_states["b"], "rho")) == 0.0


def test_masks() -> None:
    decays = {"w": True, "b": False}
    params, _, _ = run(mada(1e-2, weight_decay=0.5, mask=decays, **LEARNING), 1)
    plain, _, _ = run(mada(1e-2, weight_decay=0.0, **LEARNING), 1)
    same(params["b"], plain["b"])
    same(params["w"], plain["w"] - 1e-2 * 0.5 * PARAMS["w"], atol=1e-6)
    frozen, _, _ = run(optax.masked(mada(1e-2, **LEARNING), decays), 4)
    assert not np.allclose(frozen["w"], PARAMS["w"])


@pytest.mark.parametrize("name", ["mada", "learned_scale"])
def test_apply_if_finite(name: str) -> None:
    """A step with a gradient that is not finite changes nothing."""
    tx = optax.apply_if_finite(OPTIMIZERS[name], 3)
    params, state, _ = run(tx, 4)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert all(float(abs(update).max()) == 0.0 for update in jax.tree.leaves(updates))
    same(state.inner_state, after.inner_state)


@pytest.mark.parametrize("name", ["mada", "learned_scale"])
def test_multi_steps(name: str) -> None:
    """Gradients of several calls make one step."""
    tx = optax.MultiSteps(OPTIMIZERS[name], 2)
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(tx.update)
    for index in range(8):
        updates, state = step(gradient(params, jnp.float32(index // 2)), state, params)
        params = optax.apply_updates(params, updates)
    same(params, run(OPTIMIZERS[name], 4)[0], atol=1e-6)


def test_specs_of_a_sharded_state() -> None:
    """optax.tree_map_params knows which trees of the state are like the parameters."""
    for name in ("mada", "learned_scale"):
        state = OPTIMIZERS[name].init(PARAMS)
        specs = optax.tree_map_params(
            OPTIMIZERS[name], lambda _, spec: spec, state, {"w": "W", "b": "B"}, transform_non_params=lambda _: "none"
        )
        assert {*jax.tree.leaves(specs)} == {"W", "B", "none"}
        assert jax.tree.leaves(specs).count("W") == sum(x.shape == (2, 2) for x in jax.tree.leaves(state))


def test_low_precision() -> None:
    """Buffers are float32, and small steps of a search are not lost."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    params, state, traces = run(optax.apply_if_finite(mada(1e-2, hyper_lr=ALL, hyper_warmup=1), 3), 4, half)
    assert traces == 1
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(get(state, "buffers"))} == {jnp.dtype(jnp.float32)}
    settings = SearchSettings(start=1e-4, climb=1e-3, rate=1e-3, steps=100)
    tx = learned_scale(optax.adamw(1.0, weight_decay=0.0), settings=settings)
    params, state, _ = run(tx, 60, half)
    assert not np.array_equal(params["w"], half["w"])
    gone = float(state.learned_rate["all"]) * state.way.gone["w"]
    np.testing.assert_allclose(
        np.asarray(params["w"], np.float32), np.asarray(half["w"], np.float32) - gone, rtol=2**-8
    )


def test_what_a_search_kept_is_freed() -> None:
    """The training goes on as if it were still there; a search that is under way is left alone."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), learned_scale(mada(1.0), settings=SearchSettings(steps=3)))
    params, state, _ = run(tx, 2)
    assert end_search(state)[1].way is not None
    params, state, _ = run(tx, 6, params, state)
    freed = end_search(state)
    assert len(jax.tree.leaves(state)) - len(jax.tree.leaves(freed)) == 4
    same(run(tx, 3, params, state)[0], run(tx, 3, params, freed)[0], atol=1e-6)


def test_held_from_the_start() -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.1, 1.0, 2, 10)
    params, state, _ = run(learned_scale(optax.adamw(1.0), schedule, held=0.02), 5)
    expected, _, _ = run(optax.adamw(optax.warmup_cosine_decay_schedule(0.002, 0.02, 2, 10)), 5)
    assert state.way is None
    assert float(get(state, "learned_rate")["all"]) == np.float32(0.02)
    assert not np.allclose(params["w"], expected["w"])  # the highest rate so far is the peak: no warm-up yet


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mada(1e-3, b1=1.0), r"b1 must be a number in \[0.01, 0.99\], the box in which it is learned"),
        (lambda: mada(1e-3, gamma=-1.0, hyper_lr=0.0), r"gamma must be a number in \[0.0, 1.0\], its domain, got -1.0"),
        (lambda: mada(1e-3, hyper_lr={"beta1": 0.1}), "hyper_lr: unknown name 'beta1'; this family has b1, b2"),
        (lambda: mada(1e-3, hyper_lr=-0.1), "hyper_lr of b1 must be a finite number >= 0, got -0.1"),
        (lambda: mada(1e-3, bounds={"b1": (0.9, 0.5)}), r"bounds of b1 must be \(low, high\)"),
        (lambda: mada(1e-3, hyper_every=0), "hyper_every must be an integer >= 1, got 0"),
        (lambda: mada(1e-3, hyper_momentum=1.0), r"hyper_momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: learned_scale(optax.sgd(1.0), held=-1.0), "held must be a positive number"),
        (lambda: SearchSettings(steps=0), "steps must be a positive whole number, got 0"),
        (
            lambda: learned_scale(optax.sgd(1.0), per={"w": "a", "b": "b"}, settings={"a": SearchSettings()}).init(
                PARAMS
            ),
            "settings must have an entry for the label 'b'",
        ),
        (
            lambda: learned_scale(optax.sgd(1.0)).update(PARAMS, learned_scale(optax.sgd(1.0)).init(PARAMS)),
            r"call update\(grads, state, params\)",
        ),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_former_name_of_is_frozen_at_warns() -> None:
    with pytest.warns(DeprecationWarning, match="is_special is called is_frozen_at now"):
        assert mada_optax.is_special is mada_optax.is_frozen_at
