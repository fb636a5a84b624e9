"""The figure of a run, drawn from its stored metrics alone."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mada_lab.figures import save_figure, smoothed
from mada_lab.run.curves import coefficient_points, loss_points
from mada_lab.run.folder import Metrics, RunFolder
from mada_optim.history.drawing import PALETTE, EndLabel, draw_parts, label_ends, split, style
from mada_optim.history.notation import SCALE


def draw_run(folder: RunFolder) -> None:
    """Draw figure.png and figure.svg of a run: losses above, the path of the coefficients below."""
    config, metrics = folder.config(), folder.metrics()
    paths = coefficient_points(metrics)
    rate = "found" if any(name.startswith(SCALE) for name in paths) else f"{config.optimizer.lr:g}"
    title = f"{config.optimizer.name}, learning rate {rate}, seed {config.seed}"
    with style():
        parts = split(paths)
        heights = [3.0, *(height for height, _ in parts)]
        figure = Figure(figsize=(8, 0.8 + sum(heights)), layout="constrained")
        ratios = {"height_ratios": heights}
        rows = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0])
        _draw_losses(rows[0], metrics, title)
        draw_parts(rows[1:], parts, "What the optimizer became")
        rows[-1].set_xlabel("step")
        save_figure(figure, folder.path / "figure")


def _draw_losses(axes: Axes, metrics: Metrics, title: str) -> None:
    training = loss_points(metrics, "loss")
    validation = loss_points(metrics, "val_loss")
    labels = []
    if training:
        steps, losses = zip(*training, strict=True)
        smooth = smoothed(losses, len(losses) // 80)
        axes.plot(steps, losses, color=PALETTE[0], alpha=0.22, lw=0.7)
        axes.plot(steps, smooth, color=PALETTE[0])
        # The height of the first step is that of guessing, and would press all that is of interest to the ground.
        low, high = min(losses), max(smooth[len(smooth) // 40 :])
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        labels.append(EndLabel(smooth[-1], f"training {smooth[-1]:.3f}", PALETTE[0]))
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color=PALETTE[1], marker="o", ms=3)
        labels.append(EndLabel(losses[-1], f"validation {losses[-1]:.3f}", PALETTE[1]))
    axes.set(title=title, ylabel="loss")
    label_ends(axes, labels)
