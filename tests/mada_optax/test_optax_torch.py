"""The same numbers as the implementation in torch, over 50 steps in float64."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import mada_optax
import numpy as np
import optax
import pytest
import torch
from mada_optax.matrices import SEARCH
from small import assert_close, train, train_torch, wide

import mada_optim
from mada_optim.scale.rule import ADAPTIVE

pytestmark = pytest.mark.usefixtures("x64")
STEPS = 50
NAMES = {"b1": "beta1", "b2": "beta2", "b3": "beta3"}
ALL = {"b1": 5e-4, "b2": 5e-4, "b3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
INTERIOR = {"b1": 0.8, "b2": 0.9, "b3": 0.3, "rho": 0.4, "c": 0.6, "gamma": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "default": {"hyper_warmup": 3},
    "paper": {**INTERIOR, "hyper_lr": ALL, "hyper_warmup": 0, "hyper_momentum": 0.5, "hyper_clip": 0.01},
    "every-3": {"hyper_lr": ALL, "hyper_warmup": 2, "hyper_every": 3, "bounds": {"b1": (0.85, 0.95)}},
    "adamw": {"hyper_lr": 0.0},
    "adan": {"b1": 0.98, "b2": 0.99, "b3": 0.92, "hyper_lr": 0.0},
    "yogi": {"c": 0.0, "hyper_lr": 0.0},
    "lion": {"gamma": 0.0, "hyper_lr": 0.0, "weight_decay": 0.1},
}


def in_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for ``mada_optim.MADA``."""

    def rename(values: Any) -> Any:
        return {NAMES.get(key, key): value for key, value in values.items()} if isinstance(values, dict) else values

    arguments = {key: rename(value) for key, value in arguments.items()}
    betas = arguments.pop("b1", 0.9), arguments.pop("b2", 0.999)
    # Optax's learns without delay.
    return {"betas": betas, "hyper_delay": 0, **{NAMES.get(key, key): value for key, value in arguments.items()}}


@pytest.mark.parametrize("case", CASES)
def test_mada(case: str) -> None:
    """With a schedule where all is learned: its rate at the last step is in the hypergradient."""
    schedule = wide(optax.warmup_cosine_decay_schedule(1e-3, 2e-2, 10, STEPS)) if case == "paper" else None
    params, state = train(mada_optax.mada(schedule or 1e-2, **CASES[case]), STEPS)
    theirs, optimizer = train_torch(
        lambda named: mada_optim.MADA(named.values(), 1e-2, **in_torch(CASES[case])), STEPS, schedule
    )
    assert_close(params, theirs)
    coefficients = optax.tree_utils.tree_get(state, "coefficients")
    expected = optimizer.coefficients()
    assert {NAMES.get(name, name): float(value) for name, value in coefficients.items()} == pytest.approx(
        expected, rel=0, abs=1e-10
    )
    if case in ("default", "paper"):
        hypergradient = optax.tree_utils.tree_get(state, "hypergradient")
        np.testing.assert_allclose(hypergradient, list(optimizer.hypergradients().values()), rtol=1e-6, atol=1e-12)


def test_avgrad() -> None:
    params, _ = train(mada_optax.avgrad(1e-2), STEPS)
    assert_close(params, train_torch(lambda named: mada_optim.AVGrad(named.values(), 1e-2), STEPS)[0])


SEARCHES = {
    "held": (mada_optax.SearchSettings(steps=20, margin=2.5), optax.constant_schedule(1.0)),
    "fallen": (mada_optax.SearchSettings(start=0.05, bounds=(1e-8, 1.0)), optax.cosine_decay_schedule(1.0, STEPS)),
    "warm-up from 0": (mada_optax.SearchSettings(), optax.warmup_cosine_decay_schedule(0.0, 2.0, 5, 200)),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_learned_scale(case: str) -> None:
    settings, schedule = SEARCHES[case][0], wide(SEARCHES[case][1])
    tx = mada_optax.learned_scale(optax.adamw(1.0, weight_decay=0.1), schedule, settings=settings)
    params, state = train(tx, STEPS)
    scales = []

    def make(named: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(named.values(), weight_decay=0.1)
        search = mada_optim.SearchSettings(**asdict(settings))
        scales.append(mada_optim.LearnedScale(optimizer, settings=search))
        return optimizer

    theirs, _ = train_torch(make, STEPS, schedule)
    assert_close(params, theirs)
    (scale,) = scales
    assert bool(state.searching) == scale.searching == (case == "warm-up from 0")
    assert int(state.search_steps) == scale.steps
    if not scale.searching:
        assert float(state.learned_rate["all"]) == pytest.approx(scale.value, abs=1e-10)


def test_two_scales_and_learned_coefficients() -> None:
    """The hypergradient of a coefficient sees the rate that a scale makes of each array's."""
    arguments = {**INTERIOR, "hyper_lr": ALL, "hyper_warmup": 0}
    labels = {"first": "matrix", "last": "rest"}
    schedule = wide(optax.warmup_cosine_decay_schedule(0.1, 1.0, 5, STEPS))
    settings = {"matrix": mada_optax.SearchSettings(steps=40), "rest": mada_optax.SearchSettings(start=1e-2, climb=0.3)}
    tx = mada_optax.learned_scale(mada_optax.mada(1.0, **arguments), schedule, per=labels, settings=settings)
    params, state = train(tx, STEPS)
    scales = []

    def make(named: Any) -> torch.optim.Optimizer:
        optimizer = mada_optim.MADA([{"params": [param]} for param in named.values()], **in_torch(arguments))
        kinds = {id(group["params"][0]): kind for group, kind in zip(optimizer.param_groups, settings, strict=True)}
        searches = {kind: mada_optim.SearchSettings(**asdict(each)) for kind, each in settings.items()}
        per = lambda group: kinds[id(group["params"][0])]  # noqa: E731
        scales.append(mada_optim.LearnedScale(optimizer, per=per, settings=searches))
        return optimizer

    assert_close(params, train_torch(make, STEPS, schedule)[0])
    assert {label: float(rate) for label, rate in state.learned_rate.items()} == pytest.approx(scales[0].values)


def test_settings_are_those_of_torch() -> None:
    assert asdict(mada_optax.SearchSettings()) == asdict(mada_optim.SearchSettings())
    assert asdict(mada_optax.ADAPTIVE) == asdict(ADAPTIVE)
    assert SEARCH.bounds == (1e-8, 0.1)
    ours = [asdict(each) for each in mada_optax.mada_family().coefficients]
    theirs = [asdict(each) for each in mada_optim.MADAFamily.coefficients]
    for mine, other in zip(ours, theirs, strict=True):
        # Kinds of learning, symbols and meanings are torch's alone.
        assert {**mine, "name": NAMES.get(mine["name"], mine["name"])} == {key: other[key] for key in mine}


def test_a_family_of_ones_own() -> None:
    """Nesterov's SGD with a learned momentum, as in examples/own_family.py."""
    names = ("momentum", "nesterov")

    def update(state: Any, grad: Any, q: Any, step: Any) -> Any:
        velocity = q["momentum"] * state["velocity"] + grad
        lookahead = grad + q["momentum"] * velocity
        return (1 - q["nesterov"]) * velocity + q["nesterov"] * lookahead, {"velocity": velocity}

    class NesterovSGD(mada_optim.Family):
        coefficients = tuple(mada_optim.Coefficient(name, 0.5, box=(0.0, 0.99), hyper_lr=0.1) for name in names)

        def buffers(self, q: Any) -> tuple[str, ...]:
            return ("velocity",)

        def update(self, state: Any, grad: Any, q: Any, step: Any) -> Any:
            return update(state, grad, q, step)

    family = mada_optax.Family(
        tuple(mada_optax.Coefficient(name, 0.5, box=(0.0, 0.99), hyper_lr=0.1) for name in names),
        lambda q: ("velocity",),
        update,
    )
    params, state = train(mada_optax.hypergradient_optimizer(family, 3e-2, hyper_warmup=2), STEPS)
    make = lambda named: mada_optim.HypergradientOptimizer(named.values(), NesterovSGD(), 3e-2, hyper_warmup=2)  # noqa: E731
    theirs, optimizer = train_torch(make, STEPS)
    assert_close(params, theirs)
    coefficients = optax.tree_utils.tree_get(state, "coefficients")
    assert {name: float(value) for name, value in coefficients.items()} == pytest.approx(optimizer.coefficients())
    assert float(coefficients["momentum"]) != 0.5


def test_a_gradient_that_overflows_when_squared() -> None:
    """Cut as in torch; one that is not finite makes NaN, and leaves the coefficients where they are."""
    tx = mada_optax.mada(1e-2, hyper_warmup=0)
    params = jnp.ones(3, jnp.float32)
    state, step = tx.init(params), jax.jit(tx.update)
    for value in (1e30, jnp.inf, 1.0):
        updates, state = step(jnp.array([1.0, value, 1.0], jnp.float32), state, params)
    assert bool(jnp.isfinite(updates[jnp.array([0, 2])]).all())
    assert bool(jnp.isnan(updates[1]))
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 2
    assert float(optax.tree_utils.tree_get(state, "b1")) == 0.9
