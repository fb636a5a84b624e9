"""A small problem, and one way to train on it, in JAX and in torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch


def start(dtype: Any = np.float64, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters. The last row of the first never sees a gradient."""
    random = np.random.default_rng(seed)
    shapes = {"first": (5, 4), "last": (4, 3)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def loss(params: dict[str, jax.Array], step: jax.Array | int) -> jax.Array:
    """Of two layers; the data differ from step to step, and so do the sizes of the gradients."""
    inputs = jnp.sin(jnp.arange(30.0).reshape(6, 5) * (1 + step)).at[:, -1].set(0.0)
    targets = jnp.cos(jnp.arange(18.0).reshape(6, 3) + step)
    hidden = jnp.tanh(inputs.astype(params["first"].dtype) @ params["first"])
    return ((hidden @ params["last"] - targets) ** 2).mean()


gradients = jax.jit(jax.grad(loss))


def train(
    tx: optax.GradientTransformation, steps: int, params: Any = None, state: Any = None, first: int = 0
) -> tuple[Any, Any]:
    """Parameters and state after some steps, in one compiled loop."""
    params = jax.tree.map(jnp.asarray, start() if params is None else params)
    state = tx.init(params) if state is None else state

    def body(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, index), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda *carry: jax.lax.fori_loop(first, first + steps, body, carry))(params, state)


def train_torch(make: Any, steps: int, schedule: Any = None) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """The same in torch. ``make``: from named parameters to an optimizer; ``schedule``: learning rate of each step."""
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start().items()}
    optimizer = make(params)
    for step in range(steps):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = float(schedule(step))
        grads = gradients({name: jnp.asarray(param.detach().numpy()) for name, param in params.items()}, step)
        for name, param in params.items():
            param.grad = torch.tensor(np.asarray(grads[name]))
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}, optimizer


def wide(schedule: optax.Schedule) -> optax.Schedule:
    """A schedule in float64, whose last bits do not depend on how it is compiled."""
    return lambda count: schedule(jnp.asarray(count, jnp.float64))


def assert_close(ours: dict[str, jax.Array], theirs: dict[str, Any], atol: float = 1e-10) -> None:
    for name, value in ours.items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(theirs[name]), rtol=0, atol=atol, err_msg=name)
