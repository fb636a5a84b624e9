"""An optimizer as a user describes it, and as a run trains with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mada_lab.errors import InputError, is_number, require, require_pair


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, with what the user set.

    Args:
        name: one of ``mada_lab.optimizers.registry.ENTRIES``.
        lr: peak learning rate. None: the optimizer's own (3e-3; lion 1e-3; 1 for those that find theirs, as prodigy).
        betas: None: (0.9, 0.99), or the optimizer's own where these mean something else to it (adan, lion).
        weight_decay: decoupled, on tensors of two and more dimensions. None: 0.1 (adam: 0).
        options: further arguments of the constructor, by name; only what the user set. ``betas`` and ``weight_decay``
            among them become the fields of this name, so that they are not overruled by these.

    Raises:
        InputError: a value is not allowed; or ``options`` has ``lr``, which is a field of its own, or says of a field
            something else than the field does.
    """

    name: str = "mada"
    lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lr = self.lr
        require(lr is None or (is_number(lr) and lr > 0), "lr", lr, "a positive number")
        self._take_fields_out_of_options()
        decay = self.weight_decay
        require(decay is None or (is_number(decay) and decay >= 0), "weight_decay", decay, "a number >= 0")

    def _take_fields_out_of_options(self) -> None:
        options = dict(self.options)
        for name in ("name", "lr"):
            if name in options:
                raise InputError(
                    f"options of {self.name} must not have {name}, got {options[name]!r}: it is set for the whole run, "
                    "the learning rate by --lr, --lrs or the axis optimizer.lr"
                )
        for name in ("betas", "weight_decay"):
            if name not in options:
                continue
            value = options.pop(name)
            value = require_pair(name, value) if name == "betas" else value
            field_value = getattr(self, name)
            require(
                field_value in (None, value),
                f"{name} in the options of {self.name}",
                value,
                f"{field_value!r}, as outside of them",
            )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ResolvedOptimizer(OptimizerConfig):
    """An optimizer that can be built: its learning rate and weight decay are numbers.

    ``betas`` None stands for the constructor's own, where the usual ones mean something else to it.
    """

    lr: float = field(kw_only=True)
    weight_decay: float = field(kw_only=True)


def parse(spec: str) -> OptimizerConfig:
    """Return the optimizer of ``name`` or ``name:option=value:option=value``, as in ``mada:rho=0``.

    ``beta1`` and ``beta2`` go together and make up ``betas``.

    >>> parse("mada:rho=0:beta1=0.8:beta2=0.9:weight_decay=0.3")
    OptimizerConfig(name='mada', lr=None, betas=(0.8, 0.9), weight_decay=0.3, options={'rho': 0})

    Values are numbers. Only ``state_dtype`` is the name of a dtype: ``mada:state_dtype=bfloat16``.
    """
    name, *settings = spec.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        option = option.replace("-", "_")
        if option in options:
            raise InputError(f"{option} is given twice in {spec!r}")
        if option == "betas":
            raise InputError(f"betas must be given as beta1=NUMBER:beta2=NUMBER, got {setting!r} in {spec!r}")
        if option == "state_dtype":
            options[option] = value
            continue
        try:
            options[option] = int(value) if value.strip("+-").isdecimal() else float(value)
        except ValueError:
            raise InputError(f"optimizer option must be name=number, got {setting!r} in {spec!r}") from None
    betas = [options.pop(beta) for beta in ("beta1", "beta2") if beta in options]
    if len(betas) == 1:
        raise InputError(f"beta1 and beta2 go together, got one of them in {spec!r}")
    return OptimizerConfig(name, betas=(betas[0], betas[1]) if betas else None, options=options)
