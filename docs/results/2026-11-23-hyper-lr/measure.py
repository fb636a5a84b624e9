"""How the step sizes of the coefficients change a training: python measure.py --data FILE --out FOLDER

Trains what is not yet in FOLDER, for --minutes at most, and prints the table. The same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from mada_lab.files import read_json
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.stats import mean_interval
from mada_lab.tasks.language import LanguageConfig

# The authors' for language models, then MADA's defaults.
PAPER = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
FACTORS = (0.0, 0.1, 1.0, 10.0)
LRS = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
STEPS = 500


def configuration(data: str | None, factor: float, lr: float, seed: int) -> RunConfig:
    step_sizes = {name: factor * size for name, size in PAPER.items()}
    return RunConfig(
        LanguageConfig(data=data, layers=2, heads=2, width=64, context=64, batch=12),
        OptimizerConfig("mada", lr=lr, options={"hyper_lr": step_sizes}),
        steps=STEPS,
        seed=seed,
        threads=1,
    )


def folder_of(out: Path, factor: float, lr: float, seed: int) -> Path:
    return out / f"factor{factor:g}-lr{lr:g}-seed{seed}"


def row(out: Path, factor: float, lr: float) -> list[str]:
    """Validation losses, and where the coefficients ended (mean over seeds)."""
    folders = [folder_of(out, factor, lr, seed) for seed in SEEDS]
    results = [read_json(folder / "result.json") for folder in folders if (folder / "result.json").exists()]
    if not results:
        return [f"{factor:g}", f"{lr:g}", "-", *["-"] * 6]
    mean, half = mean_interval([result["val_loss"] for result in results])
    ends = [statistics.fmean(r["coefficients"][name] for r in results) for name in PAPER]
    loss = f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"
    return [f"{factor:g}", f"{lr:g}", loss, *(f"{end:.3f}" for end in ends)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    for seed in SEEDS:
        for lr in LRS:
            for factor in FACTORS:
                folder = folder_of(args.out, factor, lr, seed)
                if not (folder / "result.json").exists() and time.monotonic() < end:
                    resume = RunFolder(folder).config_file.exists()
                    train(configuration(args.data, factor, lr, seed), folder, resume=resume, draw=False)
    names = list(PAPER)
    print("| factor | lr | validation loss | " + " | ".join(names) + " |")
    print("| ---: " * (3 + len(names)) + "|")
    for lr in LRS:
        for factor in FACTORS:
            print("| " + " | ".join(row(args.out, factor, lr)) + " |")


if __name__ == "__main__":
    main()
