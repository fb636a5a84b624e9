"""Frameworks of JAX, checkpoints and sharded arrays; neither library brings the other's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import mada_optax
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import mada_optim

REPOSITORY = Path(__file__).parents[2]
LEARNING = {"hyper_lr": {"b1": 5e-3, "rho": 0.1}, "hyper_warmup": 2}
INPUTS = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)
TARGETS = jnp.sin(3 * INPUTS)
get = optax.tree_utils.tree_get


def square(outputs: jax.Array) -> jax.Array:
    return ((outputs - TARGETS) ** 2).mean()


def check(losses: list[Any], beta1: Any) -> None:
    assert float(losses[-1]) < 0.95 * float(losses[0])
    assert float(beta1) != np.float32(0.9)


def test_flax_nnx() -> None:
    model = nnx.Sequential(nnx.Linear(2, 8, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, mada_optax.mada(3e-2, **LEARNING), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: square(model(INPUTS)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(8)]
    check(losses, get(nnx.as_pure(nnx.state(optimizer, nnx.optimizer.OptState))["opt_state"], "b1"))


def test_flax_linen() -> None:
    model = flax.linen.Sequential([flax.linen.Dense(8), jnp.tanh, flax.linen.Dense(2)])
    params = model.init(jax.random.key(0), INPUTS)
    tx = mada_optax.mada(3e-2, **LEARNING)
    state = flax.training.train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: square(state.apply_fn(params, INPUTS)))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(8):
        state, loss = step(state)
        losses.append(loss)
    check(losses, get(state.opt_state, "b1"))


def test_equinox() -> None:
    model = eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=jax.random.key(0))
    tx = mada_optax.mada(3e-2, **LEARNING)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(lambda model: square(jax.vmap(model)(INPUTS)))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(8):
        model, state, loss = step(model, state)
        losses.append(loss)
    check(losses, get(state, "b1"))


def test_orbax_resumes_bit_for_bit(tmp_path: Path) -> None:
    """In the middle of a search, with coefficients that are learned."""
    tx = mada_optax.learned_scale(mada_optax.mada(1.0, **LEARNING), settings=mada_optax.SearchSettings(steps=7))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: square(jnp.tanh(INPUTS @ params["w"]) @ params["v"]))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones((2, 3)), "v": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)}
    carry = (params, tx.init(params))
    for _ in range(5):
        carry = step(*carry)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    for _ in range(5):
        carry, restored = step(*carry), step(*restored)
    assert jax.tree.structure(carry) == jax.tree.structure(restored)
    for one, other in zip(jax.tree.leaves(carry), jax.tree.leaves(restored), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mada_optax import SearchSettings, learned_scale, mada, omada

jax.config.update("jax_enable_x64", True)
every = dict.fromkeys(("b1", "b2", "b3", "rho", "c", "gamma"), 1e-2)
settings = SearchSettings(steps=5)
base = mada(1.0, hyper_lr=every, hyper_warmup=1)
params = {"w": jnp.sin(jnp.arange(32.0)).reshape(8, 4), "b": jnp.ones(4)}
mesh = Mesh(np.array(jax.devices()), ("data",))
shardings = {"w": NamedSharding(mesh, P("data", None)), "b": NamedSharding(mesh, P())}
assert len(jax.devices()) == 4

for tx in (
    learned_scale(optax.chain(optax.clip_by_global_norm(1.0), base), settings=settings),
    omada(matrices={"w": True, "b": False}, settings=settings),
):
    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one, many = params, jax.device_put(params, shardings)
    states = [tx.init(one), tx.init(many)]
    for _ in range(8):
        one, states[0] = step(one, states[0])
        many, states[1] = step(many, states[1])
    assert many["w"].sharding.is_equivalent_to(shardings["w"], 2), many["w"].sharding
    for a, b in zip(jax.tree.leaves((one, states[0])), jax.tree.leaves((many, states[1])), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-12)
print("equal")
"""


def test_sharded_over_four_devices() -> None:
    """The numbers of one device; the state of sharded parameters is sharded as they are."""
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize(
    ("package", "others"),
    [("mada_optax", ("torch", "mada_optim", "flax", "equinox")), ("mada_optim", ("jax", "optax", "mada_optax"))],
)
def test_neither_package_imports_the_other(package: str, others: tuple[str, ...]) -> None:
    code = f"import sys, {package}; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *others], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_the_two_distributions_go_together() -> None:
    assert mada_optax.__version__ == mada_optim.__version__
    licenses = [(folder / "LICENSE").read_text("utf-8") for folder in (REPOSITORY, REPOSITORY / "mada-optax")]
    assert licenses[0] == licenses[1]


def test_the_example(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("jax_char_gpt", REPOSITORY / "examples" / "jax_char_gpt.py")
    assert spec is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    size = ["--width", "16", "--layers", "1", "--batch", "4", "--context", "16"]
    result = example.main([*size, "--steps", "6", "--out", str(tmp_path)])
    assert result["validation"][-1][1] < result["validation"][0][1]
    assert set(result["paths"][0]) == {"b1", "b2", "b3", "rho", "c", "gamma"}
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_code_of_the_readme_runs() -> None:
    """Blocks of the distribution's README, one after the other. The documentation's page is tested with the others."""
    readme = (REPOSITORY / "mada-optax" / "README.md").read_text("utf-8")
    names: dict[str, Any] = {}
    blocks = [block.partition("```")[0] for block in readme.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        exec(block, names)
