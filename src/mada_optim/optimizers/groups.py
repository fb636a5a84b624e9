"""Parameter groups as users write them: read, completed and checked before an optimizer takes them.

Coefficients are state that groups share, not options of a group. So a group's keys never name a coefficient: a wrapper
may keep a "rho" of its own there. Where each group has its own coefficients (``hyper_per_group``), their initial values
are a mapping under "start". The one exception are betas, see :mod:`mada_optim.engine.betas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from mada_optim.arguments import as_list, is_number, tensor_of, to_python
from mada_optim.engine.betas import fixed_betas, has_betas, learned_betas
from mada_optim.engine.coefficient_set import PREVIOUS_LR, SET_SETTINGS, SET_TENSORS, Group, learning_rule
from mada_optim.families import Family
from mada_optim.kernels import check_fused
from mada_optim.learning import CoefficientSettings, resolve_settings
from mada_optim.scale.rate import given_rate
from mada_optim.tensors.distributed import check_placements
from mada_optim.warn import warn

# What a parameter group holds beside the arguments and SET_TENSORS; not taken over from another optimizer's groups.
INTERNAL_KEYS = ("family", "special", PREVIOUS_LR, "previous_betas")


def with_python_numbers(family: Family, options: Mapping[str, Any], names: Iterable[str]) -> Group:
    """A copy of options, numbers among those with one of ``names`` as Python's; ``lr`` may be a tensor."""
    converted = dict(options)
    for name in names:
        value: Any = options.get(name)
        if name == "lr" and getattr(value, "shape", ()) == (1,) and not isinstance(value, Tensor):
            value = value[0]  # an array, as torch takes it
        if name in options and not (name == "lr" and isinstance(value, Tensor)):
            converted[name] = _constant(family, name, value) if name in family.constants else to_python(value)
    return converted


def read_group(family: Family, defaults: Mapping[str, Any], param_group: Any) -> Group:
    """A parameter group as a dict of its own, with all options and a list of parameters.

    Args:
        family: of the optimizer.
        defaults: options that the group need not name.
        param_group: as the user wrote it.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
    if "params" not in param_group:
        raise ValueError(f"param_group must have 'params', got only {list(param_group)}")
    group = {**defaults, **with_python_numbers(family, param_group, defaults)}
    group["params"] = as_list(param_group["params"])
    for name in INTERNAL_KEYS:
        group.pop(name, None)
    return group


def _constant(family: Family, name: str, value: Any) -> Any:
    """A family's constant may be anything; it is a number, or several, where its default is."""
    default, numbers = family.constants[name], to_python(value)
    is_pair = isinstance(default, (tuple, list))
    return numbers if isinstance(numbers, tuple if is_pair else (bool, int, float)) else value


def resolve_group(
    family: Family, start: Mapping[str, float], param_group: Group, group: Group, shared: Group | None
) -> CoefficientSettings:
    """What a parameter group says about coefficients.

    Args:
        family: of the optimizer.
        start: initial values that the optimizer was given.
        param_group: as the user wrote it.
        group: the same, completed. Its "start" is taken out.
        shared: with whose coefficients the group has to agree: another group, or the optimizer's defaults; None:
            the group has its own.

    Raises:
        ValueError: a value makes no sense, or is not that of all groups where it must be.
        TypeError: "start" is no mapping.
    """
    own_start = to_python(group.pop("start", None)) or {}
    if not isinstance(own_start, Mapping):
        raise TypeError(f"start of a parameter group must be a mapping from name to number, got {own_start!r}")
    betas = fixed_betas(param_group) if has_betas(family) else {}
    for name in betas:
        if name in own_start:
            raise ValueError(f"parameter group: start has {name!r}, and so has betas; give one of them")
    if shared is None:
        _warn_of_misplaced(family, param_group)
        return resolve_settings(family, {**start, **own_start, **betas}, group["hyper_lr"], group["bounds"])
    group.update({key: shared[key] for key in SET_SETTINGS if key not in param_group})
    common = resolve_settings(family, start, shared["hyper_lr"], shared["bounds"])
    for name, value in own_start.items():
        if value != common.start.get(name):
            raise ValueError(_refusal("start", own_start, {name: common.start.get(name)}))
    differing = {name for name in betas if betas[name] != common.start[name]}
    learned = learned_betas({"hyper_lr": common.hyper_lr})
    if differing and ("beta1" in learned or not differing.isdisjoint(learned)):
        hint = "; or learn neither beta1 nor beta2: hyper_lr=0.0, or a mapping without them"
        ours = tuple(common.start[name] for name in betas)
        raise ValueError(_refusal("betas", tuple(betas.values()), ours) + hint)
    resolved = resolve_settings(family, {**start, **betas}, group["hyper_lr"], group["bounds"])
    asked = {**group, "hyper_lr": resolved.hyper_lr, "bounds": resolved.bounds}
    agreed = {**shared, "hyper_lr": common.hyper_lr, "bounds": common.bounds}
    for key in SET_SETTINGS:
        if asked[key] != agreed[key]:
            raise ValueError(_refusal(key, param_group[key], agreed[key]))
    return resolved


def _refusal(key: str, theirs: Any, ours: Any) -> str:
    return (
        f"parameter group sets {key!r} to {theirs!r}, but all groups share one set of coefficients, with {ours!r}; "
        "give it to the optimizer, or learn a set of coefficients for each group (hyper_per_group=True)"
    )


def check_agreement(groups: Sequence[Group]) -> None:
    """Raise ValueError where groups that share coefficients no longer agree in how these are learned."""
    for key in SET_SETTINGS:
        agreed = groups[0][key]
        for index, group in enumerate(groups):
            if group[key] is not agreed and group[key] != agreed:
                raise ValueError(
                    f"{key} of parameter group {index} is {group[key]!r}, and that of group 0 {agreed!r}; all groups "
                    "share one set of coefficients: set it in each of them, or use hyper_per_group=True"
                )


def _warn_of_misplaced(family: Family, param_group: Group) -> None:
    misplaced = {one.name: param_group[one.name] for one in family.coefficients if one.name in param_group}
    if misplaced:
        warn(
            f"parameter group: keys that are not options are kept and have no effect, also {', '.join(misplaced)}; "
            f"initial values of coefficients go under 'start': {misplaced}"
        )


def check_group(family: Family, group: Group, per_group: bool) -> None:
    """Raise where the options or parameters of a completed group make no sense.

    Args:
        family: of the optimizer.
        group: the parameter group.
        per_group: whether each of the optimizer's groups has coefficients of its own.
    """
    _check_options(family, group, per_group)
    _check_params(family, group["params"])


def _check_options(family: Family, group: Group, per_group: bool) -> None:
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(value.shape)}")
            if value.device.type == "cpu" and not 0.0 <= float(value.detach()) < math.inf:
                raise ValueError(f"lr must be a finite number >= 0, got {value!r}")
        elif not is_number(value) or value < 0.0:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    for name in ("maximize", "hyper_per_group", "capturable", "differentiable", "stochastic_rounding"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, got {group[name]!r}")
    if group["hyper_per_group"] != per_group:
        raise ValueError("hyper_per_group is an argument of the optimizer, not of one parameter group")
    for name in ("foreach", "fused"):
        if not (group[name] is None or isinstance(group[name], bool)):
            raise TypeError(f"{name} must be True, False or None, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused cannot both be True")
    if group["differentiable"] and group["fused"]:
        raise ValueError("differentiable and fused cannot both be True")
    if group["differentiable"] and (group["state_dtype"] == torch.bfloat16 or group["stochastic_rounding"]):
        raise ValueError("differentiable=True excludes rounding to bfloat16, which has no derivative")
    if group["fused"]:
        check_fused(family)
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        allowed = "None, torch.float32 or torch.bfloat16"
        raise ValueError(f"state_dtype must be {allowed}, got {group['state_dtype']!r}")
    learning_rule(group)
    for name in family.constants:
        if isinstance(group[name], Tensor):
            raise TypeError(f"{name}, a constant of {family.name}, must not be a tensor, got {group[name]!r}")
    family.validate_constants({name: group[name] for name in family.constants})


def _check_params(family: Family, params: list[Any]) -> None:
    tensors = [tensor_of(param) for param in params]
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ValueError("params: a parameter is listed twice in one parameter group")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params: can only optimize Tensors, got {type(tensor).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"params: can only optimize floating-point or complex tensors, got {tensor.dtype}")
        if tensor.is_conj():
            raise ValueError("params: a conjugate view cannot be optimized; call resolve_conj() first")
        check_placements(tensor, family.elementwise)


def describe(
    family: Family, groups: Sequence[Group], coefficients: Sequence[Mapping[str, float]], defaults: Mapping[str, Any]
) -> str:
    """Coefficients, once where all groups have the same, and what was set in each parameter group.

    Args:
        family: of the optimizer.
        groups: its parameter groups.
        coefficients: of each group.
        defaults: of the constructor's arguments.
    """
    alike = all(values == coefficients[0] for values in coefficients)
    lines = ["Coefficients", *_describe_coefficients(coefficients[0], groups[0])] if alike else []
    for index, (group, values) in enumerate(zip(groups, coefficients, strict=True)):
        lines += [f"Parameter Group {index}", *_describe_group(family, group, defaults)]
        if not alike:
            lines += _describe_coefficients(values, group)
    return "\n".join(lines)


def _describe_coefficients(values: Mapping[str, float], group: Group) -> list[str]:
    step_sizes = group["hyper_lr"]
    learned = {name: f" (learned, hyper_lr {alpha:g})" for name, alpha in step_sizes.items() if alpha > 0.0}
    return [f"    {name}: {value:g}{learned.get(name, '')}" for name, value in values.items()]


def _describe_group(family: Family, group: Group, defaults: Mapping[str, Any]) -> list[str]:
    """Learning rate, weight decay, and whatever is not as by default."""
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


def check_family_names(family: Family, options: Iterable[str]) -> None:
    """Raise ValueError where a parameter group would have two things of one name.

    Args:
        family: whose coefficients and constants have names.
        options: names of the optimizer's arguments.
    """
    taken = {"params", "param_names", *options, *SET_TENSORS, *INTERNAL_KEYS} - {"constants"}
    if has_betas(family):
        taken.add("betas")
    for name in (*family.constants, *(coefficient.name for coefficient in family.coefficients)):
        if name in taken:
            raise ValueError(f"family: {family.name} has a coefficient or constant {name!r}, a name that is taken")
        taken.add(name)
