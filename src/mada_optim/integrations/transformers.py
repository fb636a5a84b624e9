"""For the Trainer of transformers: the optimizers by name, OMADA, and the coefficients in its logs.

Importing this module imports transformers.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from mada_optim.integrations import scalars
from mada_optim.matrices.groups import matrix_groups
from mada_optim.optimizers.omada import OMADA
from mada_optim.optimizers.presets import available_optimizers, load_optimizer

__all__ = ["LogCoefficients", "OMADAFactory", "OMADATrainer", "register"]


def register() -> list[str]:
    """Register the optimizers with the Trainer by name. Call it before you make the training arguments.

    Afterwards ``TrainingArguments(optim="omada")`` works, also from a YAML file or the command line
    (``--optim omada``), with the Trainer and with any Trainer built on it. The optimizer takes ``learning_rate`` and
    ``weight_decay`` from the training arguments. It takes ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` where
    they differ from their defaults. ``optim_args="row_norm=1.0,hyper_lr=0.0"`` sets other arguments.

    Returns:
        The names: those of :func:`mada_optim.available_optimizers` that transformers does not use itself.

    Raises:
        RuntimeError: transformers has changed and cannot register optimizers this way. Use
            ``Trainer(optimizer_cls_and_kwargs=...)``, see :class:`OMADAFactory`.

    >>> "omada" in register()
    True
    """
    try:
        # transformers has no public way to add a name.
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
    except ImportError:
        raise RuntimeError(
            "this version of transformers keeps its optimizers elsewhere; pass Trainer(optimizer_cls_and_kwargs=...)"
        ) from None
    taken = {member.value for member in OptimizerNames if handlers.get(member) is not _make_by_name}
    names = [name for name in available_optimizers() if name not in taken]
    for name in names:
        handlers[_member(name)] = _make_by_name
    return names


def _member(name: str) -> OptimizerNames:
    """Return the member of the enumeration with this value, and add it if it is not there."""
    known = OptimizerNames._value2member_map_
    if name not in known:
        member = str.__new__(OptimizerNames, name)
        member._name_, member._value_ = name.upper(), name
        known[name] = OptimizerNames._member_map_[member._name_] = member
        OptimizerNames._member_names_.append(member._name_)
    return known[name]  # type: ignore[return-value]


def _make_by_name(context: Any) -> tuple[Any, dict[str, Any]]:
    """Return what the Trainer makes an optimizer of: a class or factory, and its arguments."""
    args: TrainingArguments = context.args
    name = OptimizerNames(args.optim).value
    chosen = load_optimizer(name)
    options = {"lr": args.learning_rate, **_changed_adam_options(args)}
    if issubclass(chosen, OMADA):
        options["weight_decay"] = args.weight_decay
    for option, text in context.optim_args.items():
        if option not in inspect.signature(chosen).parameters:
            raise ValueError(f"optim_args: {name} has no argument {option!r}; see help(mada_optim.{chosen.__name__})")
        try:
            options[option] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            options[option] = text
    return (OMADAFactory if issubclass(chosen, OMADA) else chosen), options


def _changed_adam_options(args: TrainingArguments) -> dict[str, Any]:
    """Return betas and eps where the user changed them: the optimizers have defaults of their own."""
    defaults = TrainingArguments.__dataclass_fields__
    changed = [name for name in ("adam_beta1", "adam_beta2") if getattr(args, name) != defaults[name].default]
    options: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2)} if changed else {}
    if args.adam_epsilon != defaults["adam_epsilon"].default:
        options["eps"] = args.adam_epsilon
    return options


class OMADAFactory:
    """Makes OMADA for the model of a Trainer: ``Trainer(..., optimizer_cls_and_kwargs=(OMADAFactory, {"lr": 3e-3}))``.

    The Trainer calls it with its model, so OMADA knows the matrices. The arguments are those of OMADA. Biases and norms
    get no weight decay, as with the Trainer; other parameters get ``weight_decay``.
    """

    def __call__(self, model: nn.Module, **options: Any) -> OMADA:
        """Make the optimizer. Called by the Trainer."""
        trainer: Any = None  # of which this method uses nothing
        decayed = Trainer.get_decay_parameter_names(trainer, model)
        return _make_omada(OMADA, model, set(decayed), options.get("weight_decay", 1e-2), options)


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
            decayed = set(self.get_decay_parameter_names(trained))
            self.optimizer = _make_omada(chosen, trained, decayed, self.args.weight_decay, options)
        return super().create_optimizer(model)


def _make_omada(
    chosen: type[OMADA], model: nn.Module, decayed: set[str], weight_decay: float, options: dict[str, Any]
) -> OMADA:
    """Make OMADA for a model. Only the parameters with the ``decayed`` names get weight decay."""
    said = {name: options[name] for name in ("matrices", "split") if name in options}
    groups = [
        {**group, "params": params, "weight_decay": weight_decay if decays else 0.0}
        for group in matrix_groups(model, **said)
        for decays in (True, False)
        if (params := [(name, param) for name, param in group["params"] if (name in decayed) == decays])
    ]
    return chosen(groups, **{name: value for name, value in options.items() if name not in said})


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
