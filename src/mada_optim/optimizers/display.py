"""An optimizer as text and as tables: its coefficients, and what the user set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from mada_optim.engine.betas import has_betas
from mada_optim.engine.coefficient_set import SET_TENSORS, Group
from mada_optim.families import Family
from mada_optim.optimizers.groups import INTERNAL_KEYS
from mada_optim.scale.in_use import rates_in_use
from mada_optim.scale.learned import as_table
from mada_optim.scale.rate import given_rate
from mada_optim.tables import Table

if TYPE_CHECKING:
    from mada_optim.optimizers.base import HypergradientOptimizer


def as_text(optimizer: HypergradientOptimizer) -> str:
    """Return the coefficients, what was set in each parameter group, and learning rates that are searched for."""
    family, groups, scale = optimizer.family, optimizer.param_groups, optimizer.scale
    defaults = _defaults(optimizer)
    coefficients = [optimizer.coefficients(index) for index in range(len(groups))]
    is_shared = all(values == coefficients[0] for values in coefficients)
    lines = ["Coefficients", *_coefficient_lines(coefficients[0], groups[0])] if is_shared else []
    for index, (group, values) in enumerate(zip(groups, coefficients, strict=True)):
        lines += [f"Parameter Group {index}", *_group_lines(family, group, defaults)]
        if not is_shared:
            lines += _coefficient_lines(values, group)
    if scale is not None:
        lines.append("Learning rate, searched for" if scale.searching else "Learning rate that was found")
        lines += [f"    {kind}: {value:.3g}" for kind, value in scale.values.items()]
    return "\n".join([f"{type(optimizer).__name__} (", *lines, ")"])


def as_tables(optimizer: HypergradientOptimizer) -> list[Table]:
    """Return the coefficients and whether they are learned, the learning rates, and the parameter groups."""
    tables: list[Table] = []
    groups = optimizer.param_groups
    symbols = {coefficient.name: coefficient.label for coefficient in optimizer.family.coefficients}
    per_group = optimizer.defaults["hyper_per_group"]
    for index, group in enumerate(groups if per_group else groups[:1]):
        heading = f"coefficient of group {index}" if per_group else "coefficient"
        step_sizes = group["hyper_lr"]
        rows = [
            (
                name if symbols[name] == name else f"{symbols[name]} {name}",
                f"{value:g}",
                f"learned, hyper_lr {step_sizes[name]:g}" if step_sizes[name] else "fixed",
            )
            for name, value in optimizer.coefficients(index).items()
        ]
        tables.append(((heading, "value", ""), rows))
    if optimizer.scale is not None:
        tables.append(as_table(optimizer.scale))
    sizes = [
        (str(index), str(len(group["params"])), f"{group['weight_decay']:g}") for index, group in enumerate(groups)
    ]
    rates = [(kind or "lr", f"{float(rate):.3g}") for kind, rate in rates_in_use(optimizer).items()]
    return [
        *tables,
        (("parameter group", "parameters", "weight decay"), sizes),
        (("learning rate", "in use"), rates),
    ]


def _defaults(optimizer: HypergradientOptimizer) -> dict[str, Any]:
    """Return the defaults of the constructor's arguments and of the family's constants."""
    classes = [cls for cls in reversed(type(optimizer).__mro__) if issubclass(cls, Optimizer) and cls is not Optimizer]
    arguments = (argument for cls in classes for argument in inspect.signature(cls).parameters.values())
    return {**optimizer.family.constants, **{argument.name: argument.default for argument in arguments}}


def _coefficient_lines(values: Mapping[str, float], group: Group) -> list[str]:
    step_sizes = group["hyper_lr"]
    learned = {name: f" (learned, hyper_lr {alpha:g})" for name, alpha in step_sizes.items() if alpha > 0.0}
    return [f"    {name}: {value:g}{learned.get(name, '')}" for name, value in values.items()]


def _group_lines(family: Family, group: Group, defaults: Mapping[str, Any]) -> list[str]:
    """Return lines with the learning rate, the weight decay, and every option that differs from its default."""
    boxes = {coefficient.name: coefficient.box for coefficient in family.coefficients}
    bounds = {name: box for name, box in group["bounds"].items() if box != boxes[name]}
    hidden = {"params", "param_names", "hyper_lr", "bounds", "learned_scale", *INTERNAL_KEYS, *SET_TENSORS}
    if has_betas(family):
        hidden.add("betas")
    options = {
        key: value
        for key, value in group.items()
        if key not in hidden and (key in ("lr", "weight_decay") or key not in defaults or value != defaults[key])
    }
    if bounds:
        options["bounds"] = bounds
    for key in ("lr", "initial_lr"):  # what was set; a learned scale uses another
        if not isinstance(options.get(key), (Tensor, NoneType)):
            options[key] = given_rate(options[key])
    return [f"    params: {len(group['params'])}", *(f"    {key}: {options[key]}" for key in sorted(options))]
