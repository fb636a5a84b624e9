"""A small GPT in JAX, with flax and mada-optax, on text that is always there: python examples/jax_char_gpt.py"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from mada_optax import mada, omada
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SYMBOLS = {"b1": "β1", "b2": "β2", "b3": "β3", "rho": "ρ", "c": "c", "gamma": "γ"}


class Block(nnx.Module):
    """Attention to what came before, then two layers."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.attention_norm, self.hidden_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.project = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x = x + self.project(mixed.reshape(batch, length, width))
        return x + self.narrow(nnx.gelu(self.widen(self.hidden_norm(x))))


class GPT(nnx.Module):
    """Predicts the next of ``vocabulary`` characters."""

    def __init__(self, vocabulary: int, width: int, layers: int, context: int, rngs: nnx.Rngs) -> None:
        self.token_embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.place_embed = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, 4, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token_embed(tokens) + self.place_embed(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross entropy in nats per character."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@nnx.jit
def step_of(model: GPT, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, windows)
    optimizer.update(model, grads)
    return loss


def numbers_of(optimizer: nnx.Optimizer, name: str) -> dict[str, float]:
    """Numbers by name, which stand in the optimizer's state under ``name``."""
    state = nnx.as_pure(nnx.state(optimizer, nnx.optimizer.OptState))["opt_state"]
    return {key: float(value) for key, value in optax.tree_utils.tree_get(state, name).items()}


def draw(path: Path, title: str, losses: list[float], validation: list[tuple[int, float]], paths: list[Any]) -> None:
    """Losses above, what was learned below: the figure of ``mada train``."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps, half = np.arange(1, len(losses) + 1), max(1, len(losses) // 80)
    smooth = [np.mean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    above.plot(steps, losses, color="#0072b2", alpha=0.22, lw=0.7)
    above.plot(steps, smooth, color="#0072b2", label=f"training {smooth[-1]:.3f}")
    above.plot(*zip(*validation, strict=True), "o-", color="#d55e00", ms=3, label=f"validation {validation[-1][1]:.3f}")
    above.set(title=title, ylabel="loss (nats)", ylim=(min(losses) - 0.05, max(smooth[len(smooth) // 40 :]) + 0.05))
    for index, name in enumerate(paths[0]):
        values = [values[name] for values in paths]
        # Several may stay at 1 together: each line is thinner than the one below it.
        label = f"{SYMBOLS.get(name, name)}  {values[-1]:.3g}"
        below.plot(steps, values, lw=max(1.0, 2.6 - 0.3 * index), label=label)
    if "b1" in paths[0]:
        below.set(title="What the optimizer became", ylabel="coefficient", ylim=(-0.03, 1.03))
    else:
        below.set(title="The learning rates that it found", ylabel="learning rate", yscale="log")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(color="#e8e8e8")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file; default: Python's language reference")
    parser.add_argument("--optimizer", choices=("mada", "omada", "adamw"), default="mada")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3, help="of mada and adamw; omada finds its own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/jax"))
    args = parser.parse_args(argv)

    text = args.data.read_text("utf-8") if args.data else "\n\n".join(topics[name] for name in sorted(topics))
    vocabulary = sorted(set(text))
    codes = {character: code for code, character in enumerate(vocabulary)}
    tokens = np.array([codes[character] for character in text], np.int32)
    training, held_out = np.split(tokens, [int(0.9 * len(tokens))])

    def windows_at(part: np.ndarray, places: np.ndarray) -> jax.Array:
        return jnp.asarray(part[places[:, None] + np.arange(args.context + 1)])

    last = len(held_out) - args.context - 1
    validation_windows = windows_at(held_out, np.linspace(0, last, 8 * args.batch).astype(int))
    model = GPT(len(vocabulary), args.width, args.layers, args.context, nnx.Rngs(0))

    # --8<-- [start:optimizer]
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, args.steps // 20, args.steps, 0.1)
    tx = {
        "adamw": optax.adamw(lambda count: args.lr * shape(count), b2=0.99, weight_decay=0.1),
        "mada": mada(lambda count: args.lr * shape(count), b2=0.99, weight_decay=0.1),
        "omada": omada(shape, weight_decay=0.1),  # needs no learning rate
    }[args.optimizer]
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx), wrt=nnx.Param)
    # --8<-- [end:optimizer]

    watched = {"mada": "coefficients", "omada": "learned_rate"}.get(args.optimizer)
    evaluate, random = nnx.jit(loss_of), np.random.default_rng(0)
    losses, paths, validation = [], [], [(0, float(evaluate(model, validation_windows)))]
    for step in range(1, args.steps + 1):
        places = random.integers(len(training) - args.context, size=args.batch)
        losses.append(float(step_of(model, optimizer, windows_at(training, places))))
        paths.append(numbers_of(optimizer, watched) if watched else {"learning rate": args.lr * float(shape(step - 1))})
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            validation.append((step, float(evaluate(model, validation_windows))))
            print(f"step {step:5d}  training {losses[-1]:.3f}  validation {validation[-1][1]:.3f}  {paths[-1]}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "training.png", f"{args.optimizer} in JAX, seed 0", losses, validation, paths)
    return {"losses": losses, "validation": validation, "paths": paths}


if __name__ == "__main__":
    main()
