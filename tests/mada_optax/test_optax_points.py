"""At its points, the family is what optax has by their names; hypergradients are derivatives of the true loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import mada_optax
import numpy as np
import optax
import pytest
from mada_optax.hypergradient import PIECE, align
from small import assert_close, loss, start, train

pytestmark = pytest.mark.usefixtures("x64")
STEPS = 20
POINTS: dict[str, tuple[dict[str, Any], optax.GradientTransformation]] = {
    "adamw": ({"b2": 0.99, "weight_decay": 0.1}, optax.adamw(1e-2, b2=0.99, weight_decay=0.1)),
    "lion": (
        {"gamma": 0.0, "lion_betas": (0.9, 0.99), "weight_decay": 0.1},
        optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.1),
    ),
    "yogi": (
        {"c": 0.0, "eps": 1e-3, "weight_decay": 0.0},
        # optax.yogi, but for where its buffers start.
        optax.chain(optax.scale_by_yogi(eps=1e-3, initial_accumulator_value=0.0), optax.scale_by_learning_rate(1e-2)),
    ),
}


@pytest.mark.parametrize("name", POINTS)
def test_points(name: str) -> None:
    arguments, theirs = POINTS[name]
    ours, _ = train(mada_optax.mada(1e-2, hyper_lr=0.0, **arguments), STEPS)
    assert_close(ours, train(theirs, STEPS)[0])


def test_adan() -> None:
    """But for the debiasing of its average of differences, which MADA leaves out.

    optax weights the differences by 1 - b2, the authors' code by b2: at b2 = 0.5 they agree.
    """
    theirs = optax.scale_by_adan(b1=0.98, b2=0.5, b3=0.99, eps=1e-8, eps_root=0.0)
    ours = mada_optax.scale_by_family(
        mada_optax.mada_family(), 1e-2, start={"b1": 0.98, "b2": 0.99, "b3": 0.5}, hyper_lr=0.0
    )
    params = jnp.asarray(start()["first"])
    state, other = ours.init(params), theirs.init(params)
    for step in range(1, 6):
        grad = params * jnp.cos(step)
        direction, state = ours.update(grad, state)
        expected, other = theirs.update(grad, other)
        root = jnp.sqrt(other.n / (1 - 0.99**step)) + 1e-8
        biased = other.v - other.v / (1 - 0.5**step)
        np.testing.assert_allclose(direction, expected + 0.5 * biased / root, rtol=0, atol=1e-12)


def test_omada_is_muon_and_adamw() -> None:
    """At rates that are held: optax.contrib.muon with the root mean square of AdamW."""
    marks = {"first": True, "last": None}
    ours = mada_optax.omada(weight_decay=0.1, matrices=marks, held={"matrices": 1e-2, "rest": 3e-3})
    muon = optax.contrib.muon(1e-2, weight_decay=0.1, consistent_rms=0.2)
    theirs = optax.partition(
        {True: muon, False: optax.adamw(3e-3, b2=0.99, weight_decay=0.1)},
        {name: bool(mark) for name, mark in marks.items()},
    )
    params, state = train(ours, STEPS)
    assert_close(params, train(theirs, STEPS)[0])
    assert state.way is None


def test_omada_searches_for_two_rates() -> None:
    marks = {"first": True, "last": None}
    settings = mada_optax.SearchSettings(steps=40)
    params, state = train(mada_optax.omada(matrices=marks, settings=settings), 45)
    rates = optax.tree_utils.tree_get(state, "learned_rate")
    assert set(rates) == {"matrices", "rest"}
    assert float(rates["matrices"]) != float(rates["rest"])
    assert not bool(state.searching)
    assert float(loss(params, 0)) < float(loss(jax.tree.map(jnp.asarray, start()), 0))


def test_which_parameters_are_matrices() -> None:
    square = jnp.ones((4, 4))
    names = ("hidden", "Embed_0", "token_embedding", "MultiHeadDotProductAttention_0", "lm_head", "wte", "header")
    params = {name: {"kernel": square, "bias": jnp.ones(4)} for name in names}
    marks = mada_optax.matrix_dimensions(params)
    assert {name for name in names if marks[name]["kernel"] is not None} == {
        "hidden",
        "MultiHeadDotProductAttention_0",
        "header",
    }
    assert all(marks[name]["bias"] is None for name in names)


def test_hypergradients_are_derivatives_of_the_true_loss() -> None:
    """Of the loss after one step, by the coefficients of that step."""
    interior = {"b1": 0.8, "b2": 0.9, "b3": 0.3, "rho": 0.4, "c": 0.6, "gamma": 0.7}
    last = 5
    params, state = train(mada_optax.mada(1e-2, **interior, hyper_lr=0.0), last)

    def next_loss(values: jax.Array) -> jax.Array:
        tx = mada_optax.mada(1e-2, **dict(zip(interior, values, strict=True)), hyper_lr=0.0)
        updates, _ = tx.update(jax.grad(loss)(params, last), state, params)
        return loss(optax.apply_updates(params, updates), last + 1)

    expected = jax.jit(jax.grad(next_loss))(jnp.array(list(interior.values())))
    _, state = train(mada_optax.mada(1e-2, **interior, hyper_lr=1e-300, hyper_warmup=0), last + 2)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "hypergradient"), expected, rtol=1e-8)


def test_hypergradients_of_large_arrays() -> None:
    """On the CPU they are summed over pieces, the last of which is shorter."""
    size = 2 * PIECE + 77
    family = mada_optax.mada_family()
    q = {
        name: jnp.float64(value) for name, value in zip(("b1", "b2", "b3", "rho", "c", "gamma"), 6 * [0.7], strict=True)
    }
    grad, next_grad = jnp.sin(jnp.arange(1.0, size + 1)), jnp.cos(jnp.arange(1.0, size + 1))
    state = dict.fromkeys(family.buffers(q), (0.1 * grad) ** 2)
    small, large = (
        jax.jit(
            lambda cut=cut: align(
                replace(family, elementwise=cut), [state], [grad], [next_grad], jnp.ones(1), q, [*q], jnp.int32(3)
            )
        )()
        for cut in (False, True)
    )
    np.testing.assert_allclose(large, small, rtol=1e-10)
