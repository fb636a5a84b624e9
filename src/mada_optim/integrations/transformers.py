"""For the Trainer of transformers: the coefficients in its logs. Importing this module imports transformers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mada_optim.integrations import scalars

__all__ = ["LogCoefficients"]


class LogCoefficients(TrainerCallback):
    """Logs the coefficients each time the Trainer logs a training loss, wherever it logs (``report_to``, its history).

    Callbacks that report come before a user's in the Trainer's order, and would not see what this one adds to the
    line that they have just been given; so the coefficients are a line of their own, of the same step.

    Args:
        trainer: the Trainer that the callback is added to: ``trainer.add_callback(LogCoefficients(trainer))``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer."""
        # Only lines of training have a loss by this name: no evaluation, no summary, nor this callback's own line.
        if logs is not None and "loss" in logs:
            self.trainer.log(scalars(kwargs["optimizer"]))
