"""What the demo is compared with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuned:
    """What AdamW reaches at its best learning rate, from a stored result: the mean over seeds of the final loss."""

    lr: float = 3e-3
    loss: float = 1.7689
    half_width: float = 0.0166
    seeds: int = 5
    page: str = "docs/results/2026-11-27-ablations"
