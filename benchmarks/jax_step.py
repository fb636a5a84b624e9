"""What a jitted step of mada-optax costs beside optax.adamw's: python benchmarks/jax_step.py

Every line is timed in turn with AdamW, on one array, with donated buffers. Other work on the machine spoils the times;
with --cpu-time what counts is the time that all threads of this process work.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from mada_optax import avgrad, learned_scale, mada

EVERY = dict.fromkeys(("b1", "b2", "b3", "rho", "c", "gamma"), 1e-3)
CONTENDERS: dict[str, optax.GradientTransformation] = {
    "mada, nothing learned": mada(1e-3, hyper_lr=0.0),
    "avgrad": avgrad(1e-3),
    "mada, default": mada(1e-3, hyper_warmup=0),
    "mada, everything learned": mada(1e-3, hyper_lr=EVERY, hyper_warmup=0),
    "mada, everything, hyper_every=10": mada(1e-3, hyper_lr=EVERY, hyper_warmup=0, hyper_every=10),
    "learned_scale(adamw), searching": learned_scale(optax.adamw(1.0)),
    "learned_scale(adamw), afterwards": learned_scale(optax.adamw(1.0), held=1e-3),
}


def stepper(tx: optax.GradientTransformation, size: int, clock: Callable[[], float]) -> Callable[[], float]:
    """A function that takes one step, and returns the seconds that it took."""

    def update(params: jax.Array, state: Any, grads: jax.Array) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    params, grads = (jax.random.normal(jax.random.key(seed), (size,)) for seed in (0, 1))
    held = [params, tx.init(params)]

    def step() -> float:
        begin = clock()
        held[:] = jax.block_until_ready(jitted(*held, grads))
        return clock() - begin

    for _ in range(2):  # compiles
        step()
    return step


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args(argv)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{args.size:,} numbers in float32, {args.rounds} rounds, {'CPU' if args.cpu_time else 'wall'} time\n")
    print("| transformation | ratio to optax.adamw | quartiles | ms |\n| --- | ---: | ---: | ---: |")
    adamw = stepper(optax.adamw(1e-3), args.size, clock)
    ratios: dict[str, list[float]] = {}
    for name in args.only:
        step = stepper(CONTENDERS[name], args.size, clock)
        pairs = [(step(), adamw()) for _ in range(args.rounds)]
        ratios[name] = [ours / theirs for ours, theirs in pairs]
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        milliseconds = 1e3 * statistics.median(ours for ours, _ in pairs)
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {milliseconds:.0f} |", flush=True)
    return ratios


if __name__ == "__main__":
    main()
