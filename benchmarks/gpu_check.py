"""All checks and timings that need a GPU, in one call: ``python benchmarks/gpu_check.py [--out OUT] [--parts ...]``.

Prints as it goes, and writes to OUT (default: benchmarks/results/DATE-DEVICE), the parts

- ``bench``: what a step costs, as `mada bench`, by the clock on the wall, program and device together;
- ``device``: what it costs the device alone, as in a training that keeps it busy, and how long the program takes;
- ``training``: a short training of GPT-2 124M with AdamW and MADA: time of a step, peak memory, loss;
- ``checks``: agreement with the CPU for every named optimizer and dtype, steps without a wait for the device, a
  captured graph, recompilations, bfloat16 state, subnormal averages.

Let nothing else use the cores meanwhile. What fails is listed at the end, and counts in the
exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

import mada_optim
from mada_lab.bench.contenders import contenders, matrices_apart
from mada_lab.bench.workloads import WORKLOADS
from mada_lab.cli.main import main as mada
from mada_optim import MADA, OMADA

SHAPES = [(), (7,), (65, 129), (300, 400), (1 << 20,)]
EVERYTHING = {"beta3": 0.3, "rho": 0.5, "c": 0.6, "gamma": 0.7, "hyper_warmup": 0}
STEPS = 8
STEADY = 14  # steps of a training after which MADA's coefficients move and all is compiled; ten are left

PARTS = ("bench", "device", "training", "checks")

Optimizer = Callable[..., torch.optim.Optimizer]


def optimizers() -> dict[str, Optimizer]:
    """Every named point, MADA inside its box, and OMADA without and with matrices."""
    named = {name: mada_optim.load_optimizer(name) for name in mada_optim.available_optimizers()}
    return {**named, "mada inside": partial(MADA, **EVERYTHING), "omada": OMADA, "omada, matrices": _omada}


def _omada(params: list[nn.Parameter], **kwargs: object) -> torch.optim.Optimizer:
    return OMADA(matrices_apart(params), **kwargs)


def train(make: Optimizer, device: str, dtype: torch.dtype, **kwargs: object) -> list[torch.Tensor]:
    """Parameters after some steps with the same gradients on any device."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    optimizer = make(params, lr=1e-3, **kwargs)
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return [param.detach().cpu().double() for param in params]


# Checks, which may run side by side.


def check_agreement(name: str) -> None:
    """Fused on the GPU, and plain on the GPU, with the CPU."""
    make, failed = optimizers()[name], []
    for dtype, allowed in {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}.items():
        expected = train(make, "cpu", dtype, fused=False)
        for fused in (None, False):
            found = train(make, "cuda", dtype, fused=fused)
            error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
            print(f"  {dtype!s:<15} fused={fused!s:<5} largest difference {error:.1e}")
            # The Newton-Schulz iteration is in float32.
            if not error <= max(allowed, 2e-5 if "matrices" in name else 0.0):
                failed.append(f"{dtype} fused={fused}")
    assert not failed, failed


def check_no_waiting(name: str) -> None:
    """torch raises where the host waits for the device."""
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    optimizer = optimizers()[name](params, lr=1e-3)
    for step in range(12):
        for param in params:
            param.grad = torch.randn_like(param)
        torch.cuda.set_sync_debug_mode("error" if step >= 6 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_graph() -> None:
    """Steps replayed from a graph are those of the program."""
    for fused in (None, False):
        results = []
        for captured in (False, True):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer = MADA(params, lr=1e-3, capturable=True, fused=fused, hyper_every=2, **EVERYTHING)
            graph = torch.cuda.CUDAGraph()
            torch.manual_seed(1)
            for step in range(10):
                for param in params:
                    param.grad.copy_(torch.randn_like(param))
                if captured and step == 4:
                    torch.cuda.synchronize()
                    # Capturing does not run: the first replay is this step.
                    with torch.cuda.graph(graph):
                        optimizer.step()
                if captured and step >= 4:
                    graph.replay()
                else:
                    optimizer.step()
            results.append((params, optimizer.coefficients()))
        for a, b in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(a, b)
        assert results[0][1] == results[1][1], results
        print(f"  fused={fused}: 6 replayed steps equal 6 steps")


def check_bfloat16_state() -> None:
    """Stochastic rounding is right on average: elements scatter around those of float32 state, and their mean stays."""
    rounded, exact = (train(MADA, "cuda", torch.float32, state_dtype=d, **EVERYTHING) for d in (torch.bfloat16, None))
    apart = rounded[-1] - exact[-1]
    print(f"  of {apart.numel()} elements: mean difference {apart.mean():.1e}, standard deviation {apart.std():.1e}")
    assert abs(float(apart.mean())) < 1e-6
    assert float(apart.std()) < 1e-4


def check_subnormal_averages() -> None:
    """Averages of squares that have fallen below the smallest normal number do not spoil the hypergradient."""
    x = nn.Parameter(torch.ones(1 << 14, device="cuda"))
    optimizer = MADA([x], lr=1e-3, hyper_lr={"c": 0.1, "beta2": 1e-3}, hyper_warmup=0)
    for step in range(6):
        x.grad = torch.ones_like(x)
        if step >= 2:
            x.grad[::2] = 0.0
            optimizer.state[x]["exp_avg_sq"][::2] = 1e-40
        optimizer.step()
    assert optimizer.skipped_hypergradients == 0
    assert bool(x.isfinite().all())


def check_recompilations() -> None:
    """None for other shapes, numbers of parameters, rates, counts and coefficients."""
    from triton import knobs

    compiled: list[object] = []
    knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found)  # type: ignore[assignment]
    counts = []
    for size in (10, 100_000, 1 << 22, 1):
        params = [nn.Parameter(torch.randn(size + i, device="cuda")) for i in range(1 + size % 7)]
        optimizer = MADA(params, lr=1.0 / size, **EVERYTHING)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        counts.append(len(compiled))
    print(f"  kernels after each size: {counts}")
    assert counts[0] > 0
    assert len(set(counts)) == 1


# Timings, one after the other.


def time_on_device(steps: int = 10, asleep: float = 0.06) -> None:
    """Steps that the device finds waiting, for it is put to sleep while the program prepares them."""
    for letter in "ab":
        workload = WORKLOADS[letter]("cuda")
        baseline: float | None = None
        print(f"  ({letter}) {workload.title}")
        for contender in contenders():
            if contender.make is None or contender.kind == "peer" or "plain" in contender.name:
                continue
            optimizer = contender.make(list(workload.params))
            for _ in range(4):
                optimizer.step()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(asleep * 2e9))  # cycles
            begin.record()
            began = time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            program = 1e3 * (time.perf_counter() - began) / steps
            end.record()
            torch.cuda.synchronize()
            device = begin.elapsed_time(end) / steps
            baseline = device if baseline is None else baseline
            print(
                f"  {contender.name:<34} device {device:7.3f} ms, {device / baseline:5.2f} of AdamW's; "
                f"program {program:7.3f} ms",
                flush=True,
            )
            del optimizer


def compare_training(steps: int = 24, tokens: int = 1024, batch: int = 96) -> None:
    """Whole training steps of GPT-2 124M in bfloat16 autocast: time, memory, loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    everything = partial(mada_optim.load_optimizer("mada-paper"), hyper_warmup=10)
    makers: dict[str, Optimizer] = {
        "AdamW, fused": partial(torch.optim.AdamW, fused=True),
        "MADA, everything": everything,
        "MADA, everything, hyper_every=10": partial(everything, hyper_every=10),
        "MADA, nothing learned": partial(MADA, hyper_lr=0.0),
    }
    generator = torch.Generator().manual_seed(0)
    # A source with structure to learn: a fixed random map from token to token, followed nine times out of ten.
    follow = torch.randint(0, 50257, (50257,), generator=generator)
    # Means, for in one of ten steps that of hyper_every=10 does more than in the others.
    seconds: dict[str, float] = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = GPT2LMHeadModel(GPT2Config(use_cache=False))
        optimizer = make(model.parameters(), lr=3e-4)
        torch.cuda.reset_peak_memory_stats()
        times, micro = [], 32
        for step in range(steps):
            x = torch.empty(batch, tokens, dtype=torch.long)
            x[:, 0] = torch.randint(0, 50257, (batch,), generator=torch.Generator().manual_seed(step))
            noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(step)) < 0.1
            for i in range(1, tokens):
                x[:, i] = torch.where(noise[:, i], (x[:, i - 1] * 31 + i) % 50257, follow[x[:, i - 1]])
            x = x.cuda()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            optimizer.zero_grad()
            total = 0.0
            for part in x.split(micro):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(input_ids=part, labels=part).loss
                (loss * (micro / batch)).backward()
                total += loss.detach() * (micro / batch)
            optimizer.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() / 2**30
        seconds[name] = fmean(times[STEADY:])
        ratio = seconds[name] / seconds["AdamW, fused"]
        print(
            f"  {name:<34} {1e3 * seconds[name]:7.1f} ms  {ratio:.3f} of AdamW's  "
            f"{batch * tokens} tokens a step  peak {peak:.2f} GiB  loss {float(total):.4f}",
            flush=True,
        )
        del model, optimizer
        torch.cuda.empty_cache()


class _Tee:
    def __init__(self, *streams: object) -> None:
        self.streams = streams

    def write(self, text: str) -> None:
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


def run_alone(function: Callable[..., None], *arguments: str) -> tuple[str, bool]:
    """What a check prints, and whether it holds."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            function(*arguments)
        except Exception:
            print(traceback.format_exc())
            return text.getvalue(), False
    return text.getvalue(), True


def run_checks() -> list[str]:
    """All of them, each in a process of its own, since compiling takes most of the time; the names of what failed."""
    checks: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
        "captured graph": (check_graph, ()),
        "recompilations": (check_recompilations, ()),
        "subnormal averages": (check_subnormal_averages, ()),
        "bfloat16 state": (check_bfloat16_state, ()),
        **{f"agreement of {name}": (check_agreement, (name,)) for name in optimizers()},
        **{f"no waiting in {name}": (check_no_waiting, (name,)) for name in optimizers()},
    }
    failed = []
    workers = min(len(checks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_alone, check, *arguments): name for name, (check, arguments) in checks.items()}
        for future in as_completed(futures):
            try:
                text, holds = future.result()
            except BrokenProcessPool as error:
                text, holds = f"{error}\n", False
            print(f"{futures[future]}: {'holds' if holds else 'FAILED'}\n{text}", end="", flush=True)
            if not holds:
                failed.append(futures[future])
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="All checks and timings that need a GPU.")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/DATE-DEVICE)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of mada bench, for each contender (default: 0.3)")
    parser.add_argument("--workloads", default="ab", help="of mada bench; c takes minutes (default: ab)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing was checked.")
        return 2
    device = torch.cuda.get_device_name().replace(" ", "-")
    out = arguments.out or Path(__file__).parent / "results" / f"{date.today()}-{device}"
    out.mkdir(parents=True, exist_ok=True)
    bench = ["bench", "--device", "cuda", "--seconds", str(arguments.seconds), "--workloads", arguments.workloads]
    bench += ["--out", str(out / "bench")]

    def run_bench() -> list[str]:
        return ["bench"] if mada(bench) else []

    def alone(part: Callable[[], None]) -> list[str]:
        part()
        return []

    parts = {
        "bench": run_bench,
        "device": partial(alone, time_on_device),
        "training": partial(alone, compare_training),
        "checks": run_checks,
    }
    failed: list[str] = []
    with (out / "output.txt").open("w", buffering=1) as file, contextlib.redirect_stdout(_Tee(sys.stdout, file)):
        print(f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        for part in arguments.parts:
            began = time.perf_counter()
            print(f"\n{part}", flush=True)
            try:
                failed += parts[part]()
            except Exception:  # the others are to go on
                print(traceback.format_exc())
                failed.append(part)
            print(f"{time.perf_counter() - began:.0f} s")
        print(f"\nFailed: {', '.join(failed) or 'nothing'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
