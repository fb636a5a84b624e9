"""Trains a GPT on packed tokens, with AdamW and with MADA: speed, memory, loss, and the time of the authors' full run.

``python benchmarks/gpu_train.py DATA [--lambada FILE] [--steps 300] [--out OUT]``, DATA being a folder of ``mada
tokens``. The defaults are GPT-2 124M at some 100,000 tokens a step, a few minutes each on one H100. The run folders are
kept in OUT; what was interrupted goes on with the same command. Needs no GPU for a model small enough.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from mada_lab.display.progress import Display
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig
from mada_lab.run.folder import RunFolder
from mada_lab.run.result import Result
from mada_lab.run.train import train
from mada_lab.tasks.tokens import TokensConfig

FULL_STEPS, FULL_TOKENS = 100_000, 480 * 1024  # the authors': steps, tokens in each


def config(arguments: argparse.Namespace, optimizer: str) -> RunConfig:
    """The authors' recipe but for the number of steps and of tokens in a step."""
    names = ("data", "layers", "heads", "width", "context", "batch", "val_windows", "lambada")
    task = TokensConfig(**{name: getattr(arguments, name) for name in names})
    return RunConfig(
        task,
        OptimizerConfig(optimizer, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1),
        steps=arguments.steps,
        accumulate=arguments.accumulate,
        warmup=0.1,
        eval_every=arguments.steps,
        checkpoint_every=max(1, arguments.steps // 2),
        device=arguments.device,
    )


def describe(result: Result, run: RunConfig, peak: int) -> list[str]:
    """One row of the table."""
    assert isinstance(run.task, TokensConfig)
    if result.step_seconds is None or result.optimizer_seconds is None:
        return [run.optimizer.name, result.status]
    tokens = run.task.batch * run.task.context
    # The optimizer's share does not grow with the batch.
    model_seconds = (result.step_seconds - result.optimizer_seconds) / tokens
    days = FULL_STEPS * (model_seconds * FULL_TOKENS + result.optimizer_seconds) / 86_400
    measures = "  ".join(f"{name} {value:.4g}" for name, value in result.val.items())
    return [
        f"{run.optimizer.name:<8}",
        f"{tokens / result.step_seconds:>10,.0f} tokens/s",
        f"{1e3 * result.optimizer_seconds:>8.1f} of {1e3 * result.step_seconds:.1f} ms in the optimizer",
        f"peak {peak / 2**30:.2f} GiB" if peak else "peak -",  # of a run that was over already, or without a GPU
        f"full run {days:.2f} days on this device",
        f"train {result.train_loss}  val {result.val_loss}",
        measures,
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("data", help="a folder that 'mada tokens' made")
    parser.add_argument("--lambada", help="file; measured before and after training")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_train"))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "mada"])
    parser.add_argument("--device")
    sizes = {"steps": 300, "layers": 12, "heads": 12, "width": 768, "context": 1024, "batch": 96}
    for name, default in {**sizes, "accumulate": 4, "val-windows": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}")
    for optimizer in arguments.optimizers:
        run = config(arguments, optimizer)
        folder = RunFolder(arguments.out / optimizer)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with Display(Console(), run.steps) as display:
            result = train(
                run,
                folder.path,
                resume=folder.config_file.exists(),
                on_begin=display.begin,
                on_step=display,
                draw=False,
            )
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print("  ".join(describe(result, run, peak)), flush=True)
        if result.status == "interrupted":
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
