"""For the Trainer of transformers: OMADA, and the coefficients in its logs.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mada_optim.integrations import scalars
from mada_optim.matrices.groups import matrix_groups
from mada_optim.omada import OMADA

__all__ = ["LogCoefficients", "OMADATrainer"]


class OMADATrainer(Trainer):
    """A Trainer that tells OMADA which parameters of the model are matrices.

    The Trainer itself hands an optimizer lists of parameters, of which OMADA cannot know. Give this one OMADA and its
    arguments as usual, ``optimizer_cls_and_kwargs=(OMADA, {"lr": 3e-3})``; ``matrices`` and ``split`` may be among
    them. Without, it takes ``learning_rate`` from the training arguments. Biases and norms get no weight decay, as with
    the Trainer, other parameters that of the training arguments. An optimizer that is not OMADA is made as the Trainer
    makes it.

    A Trainer of another library is combined with it: ``class OMADASFTTrainer(OMADATrainer, SFTTrainer): pass``.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Called by the Trainer."""
        chosen, options = self.optimizer_cls_and_kwargs or (OMADA, {"lr": self.args.learning_rate})
        if self.optimizer is None and isinstance(chosen, type) and issubclass(chosen, OMADA):
            trained: Any = self.model if model is None else model
            said = {name: options[name] for name in ("matrices", "split") if name in options}
            options = {name: value for name, value in options.items() if name not in said}
            decayed = set(self.get_decay_parameter_names(trained))
            groups = [
                {**group, "params": params, "weight_decay": self.args.weight_decay if decays else 0.0}
                for group in matrix_groups(trained, **said)
                for decays in (True, False)
                if (params := [(name, param) for name, param in group["params"] if (name in decayed) == decays])
            ]
            self.optimizer = chosen(groups, **options)
        return super().create_optimizer(model)


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
