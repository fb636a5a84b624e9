"""For Lightning's Trainer: the coefficients in its logs. Importing this module imports lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mada_optim.integrations import scalars, unwrap

__all__ = ["LogCoefficients"]


class LogCoefficients(Callback):
    """Logs the coefficients every ``log_every_n_steps`` through the loggers of the Trainer.

    Where several optimizers learn, the index of the optimizer stands in the names. Others are passed over.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[LogCoefficients()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Called by the Trainer."""
        # As Lightning's own callbacks ask; public it has only the count of steps of all optimizers together.
        if not trainer._logger_connector.should_update_logs:
            return
        learning = {i: o for i, o in enumerate(trainer.optimizers) if unwrap(o) is not None}
        for index, optimizer in learning.items():
            prefix = "coefficients/" if len(learning) == 1 else f"coefficients/optimizer{index}/"
            pl_module.log_dict(scalars(optimizer, prefix))
