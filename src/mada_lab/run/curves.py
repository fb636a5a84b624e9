"""The metrics of a run as points over its steps."""

from __future__ import annotations

from mada_lab.run.folder import Metrics


def loss_points(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    """Return step and value of the lines that have one.

    Args:
        metrics: of a run.
        name: "loss" of training, or "val_loss".
    """
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def coefficient_points(metrics: Metrics) -> dict[str, list[tuple[int, float]]]:
    """Return the path of each coefficient; none where the optimizer has no coefficients."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.get("coefficients", {}).items():
            points.setdefault(name, []).append((line["step"], value))
    return points
