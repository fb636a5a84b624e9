"""The demo: one model, trained from one badly guessed learning rate by AdamW and by OMADA, side by side.

It is a comparison with a preset, so its folder is that of ``mada compare``: it goes on after an interruption, and
``mada report`` reads it. ``demo.png`` and ``.svg`` are added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mada_lab.demo.display import DemoDisplay
from mada_lab.demo.tuned import Tuned
from mada_lab.run.coefficients import scales_of
from mada_lab.run.config import RunConfig
from mada_lab.run.curves import coefficient_points, loss_points
from mada_lab.run.stored import StoredRun, load_run
from mada_lab.sweep.comparison import comparison
from mada_lab.sweep.experiment import Experiment
from mada_lab.sweep.run_stages import Ending, run_stages
from mada_lab.sweep.side_by_side import SideBySide
from mada_lab.sweep.stage_folder import TUNE, run_folder
from mada_lab.tasks.language import LanguageConfig
from mada_lab.text import loss_or_diverged

NAMES = {"adamw": "AdamW", "omada": "OMADA"}
"""The optimizers that are trained, and what people call them."""
GUESS = 3e-4
"""What many people try first. Here AdamW wants ten times as much."""
STEPS = 600


def demo(lr: float, base: RunConfig) -> Experiment:
    """Return the experiment.

    Args:
        lr: the guess, with which both start.
        base: everything else that the runs have in common.
    """
    experiment = comparison(list(NAMES), [lr], [base.seed], base)
    return dataclasses.replace(experiment, title="Demo: a badly guessed learning rate")


def tuned(experiment: Experiment) -> Tuned | None:
    """The stored result of a tuned AdamW; None where it is of another model, text or length of training."""
    base = experiment.base
    stored = RunConfig(LanguageConfig(), steps=STEPS, threads=base.threads, device=base.device, seed=base.seed)
    stored = dataclasses.replace(stored, eval_every=base.eval_every, checkpoint_every=base.checkpoint_every)
    return Tuned() if base == stored else None


def introduction(experiment: Experiment) -> str:
    """Say what is trained, and that the guess is a bad one on purpose."""
    guess = experiment.axes["optimizer.lr"][0]
    source = "" if experiment.base.task.data is not None else ", which is Python's language reference,"
    text = f"The same model, text{source} and learning rate for both: {guess:g}."
    best = tuned(experiment)
    if best is not None and guess == GUESS:
        text += (
            f" That is a bad guess on purpose, as people make them: many try {guess:g} first, "
            f"and AdamW's best rate here is {best.lr:g}."
        )
    return text


def train_side_by_side(experiment: Experiment, folder: Path, console: Console) -> Ending:
    """Train what is not over yet in ``folder``, and show it. Raises :class:`InputError` as :func:`run_stages` does."""
    guess = experiment.axes["optimizer.lr"][0]
    titles = {
        name: f"{NAMES[label]}, learning rate {guess:g}" if label == "adamw" else f"{NAMES[label]}, finds its rate"
        for label in NAMES
        for name in experiment.tune(label)
    }
    display = DemoDisplay(console, experiment.base.steps, titles)
    for name in titles:
        display.show_stored(run_folder(folder, name), name)
    with display:
        return run_stages(experiment, {TUNE: folder}, 1, lambda _: None, pool=SideBySide(display))


def stored_runs(experiment: Experiment, folder: Path) -> dict[str, StoredRun]:
    """Return the runs that are over, by label."""
    runs = {label: load_run(run_folder(folder, name)) for label in NAMES for name in experiment.tune(label)}
    return {label: run for label, run in runs.items() if run is not None}


def table(experiment: Experiment, runs: dict[str, StoredRun]) -> list[Sequence[str]]:
    """Return how each ended: name, learning rate, final validation loss, time of a step."""
    rows: list[Sequence[str]] = [("", "learning rate", "validation loss", "ms per step")]
    for label, run in runs.items():
        paths = scales_of(coefficient_points(run.metrics))
        rates = ", ".join(f"{points[-1][1]:.2g} ({kind})" for kind, points in paths.items())
        seconds = run.result.step_seconds
        time = "" if seconds is None else f"{1000 * seconds:.0f}"
        rows.append(
            (
                NAMES[label],
                rates or f"{run.lr:g}, the guess",
                loss_or_diverged(run.result.val_loss),
                time,
            )
        )
    best = tuned(experiment)
    if best is not None:
        rows.append(("AdamW, tuned", f"{best.lr:g}, by grid search", f"{best.loss:.4f}", ""))
    return rows


def verdict(experiment: Experiment, runs: dict[str, StoredRun]) -> str:
    """Say the difference in a sentence, and what a tuned AdamW would have reached in another."""
    theirs, ours = (runs[label].result.val_loss for label in NAMES)
    steps = experiment.base.steps
    if theirs is None or ours is None:
        diverged = [NAMES[label] for label, run in runs.items() if run.result.val_loss is None]
        return f"From this guess, {' and '.join(diverged)} diverged."
    side = "below" if ours < theirs else "above"
    text = f"From the same guess, OMADA ends {abs(ours - theirs):.2f} nats {side} AdamW after {steps} steps."
    reached = first_step_at(runs["omada"], theirs)
    if reached is not None and reached < steps:
        text += f" It had AdamW's final loss by step {reached}."
    best = tuned(experiment)
    if best is not None:
        text += (
            f" AdamW at {best.lr:g}, the best rate of a grid search, ends at {best.loss:.2f} ± {best.half_width:.2f} "
            f"({best.seeds} seeds, stored in {best.page}, not trained here)."
        )
    return text


def first_step_at(run: StoredRun, loss: float) -> int | None:
    """The first step whose validation loss is no higher than ``loss``."""
    return next((step for step, value in loss_points(run.metrics, "val_loss") if value <= loss), None)


def draw(experiment: Experiment, runs: dict[str, StoredRun], folder: Path) -> None:
    """Draw demo.png and .svg."""
    from mada_lab.demo.figure import draw_demo

    guess = experiment.axes["optimizer.lr"][0]
    title = f"The same model, text and guessed learning rate, {guess:g}"
    metrics = {NAMES[label]: run.metrics for label, run in runs.items()}
    draw_demo(metrics, guess, tuned(experiment), folder / "demo", title)
