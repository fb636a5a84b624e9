"""Parameter groups as users write them: read, completed and checked before an optimizer takes them.

Coefficients are state that groups share, not options of a group. So a group's keys never name a coefficient: a wrapper
may keep a "rho" of its own there. Where each group has its own coefficients (``hyper_per_group``), their initial values
are a mapping under "start". The one exception are betas, see :mod:`mada_optim.engine.betas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.arguments import as_list, is_number, tensor_of, to_python
from mada_optim.engine.betas import fixed_betas, has_betas, ignores_betas, learned_betas, without_effect
from mada_optim.engine.coefficient_set import (
    PREVIOUS_LR,
    SET_SETTINGS,
    SET_TENSORS,
    Group,
    learning_rule,
    new_tensors,
)
from mada_optim.engine.parameter_state import ParameterState
from mada_optim.families import Family
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.kernels import check_fused
from mada_optim.learning import CoefficientSettings, resolve_settings
from mada_optim.tensors.devices import device_with_values, number_dtype, number_on
from mada_optim.tensors.distributed import check_learnable, check_placements
from mada_optim.warn import warn

# What every parameter group holds beside the arguments and SET_TENSORS.
STORED_KEYS = ("family", "special", PREVIOUS_LR)
# What is not taken over from another optimizer's groups.
INTERNAL_KEYS = (*STORED_KEYS, "previous_betas")


def with_python_numbers(family: Family, options: Mapping[str, Any], names: Iterable[str]) -> Group:
    """Return a copy of options, with Python's numbers under ``names``; ``lr`` may stay a tensor."""
    converted = dict(options)
    for name in names:
        value: Any = options.get(name)
        if name == "lr" and getattr(value, "shape", ()) == (1,) and not isinstance(value, Tensor):
            value = value[0]  # an array, as torch takes it
        if name in options and not (name == "lr" and isinstance(value, Tensor)):
            converted[name] = _constant(family, name, value) if name in family.constants else to_python(value)
    return converted


def read_group(family: Family, defaults: Mapping[str, Any], param_group: Any) -> Group:
    """Return a parameter group as a new dict, with all options and a list of parameters.

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
    """Return a constant as the family needs it: Python's number, or several, where its default is that."""
    default, numbers = family.constants[name], to_python(value)
    is_pair = isinstance(default, (tuple, list))
    return numbers if isinstance(numbers, tuple if is_pair else (bool, int, float)) else value


def join_coefficients(
    family: Family,
    start: Mapping[str, float],
    defaults: Group,
    groups: Sequence[Group],
    param_group: Group,
    group: Group,
) -> dict[str, float]:
    """Give a checked parameter group its coefficients, and return their initial values.

    Args:
        family: of the optimizer.
        start: initial values that the optimizer was given.
        defaults: of the optimizer.
        groups: those that the optimizer has already. Unless ``hyper_per_group``, the first has the coefficients.
        param_group: as the user wrote it.
        group: the same, completed. Changed.

    Raises:
        ValueError: what the group says makes no sense, or is not what all groups have to agree on.
        TypeError: "start" is no mapping.
        RuntimeError: coefficients cannot be learned of such parameters.
    """
    first = None if defaults["hyper_per_group"] or not groups else groups[0]
    shared = None if defaults["hyper_per_group"] else first or defaults
    settings = _resolve(family, start, param_group, group, shared)
    is_learning = any(settings.hyper_lr.values())
    if group["differentiable"] and is_learning:
        raise ValueError("differentiable=True needs coefficients that are not learned: hyper_lr=0.0")
    group.update(
        family=family.name,
        hyper_lr=settings.hyper_lr,
        bounds=settings.bounds,
        special=settings.special,
    )
    if ignores_betas(family, group) and fixed_betas(param_group).items() - start.items():
        raise ValueError(without_effect(param_group["betas"]))
    tensors = [tensor_of(param) for param in group["params"]]
    if is_learning:
        check_learnable(tensors)
    device = device_with_values(tensors)
    group[PREVIOUS_LR] = number_on(0.0, device) if group["capturable"] else 0.0
    if first is not None:
        group.update({key: first[key] for key in (*SET_SETTINGS, *SET_TENSORS, "special")})
    else:
        values = list(settings.start.values())
        group.update(new_tensors(values, number_dtype(device), device, group["capturable"]))
    ParameterState(FamilyInGroup(family, group)).check_names()
    return settings.start


def _resolve(
    family: Family, start: Mapping[str, float], param_group: Group, group: Group, shared: Group | None
) -> CoefficientSettings:
    """Return what a parameter group says about coefficients.

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
    group_start = to_python(group.pop("start", None)) or {}
    if not isinstance(group_start, Mapping):
        raise TypeError(f"start of a parameter group must be a mapping from name to number, got {group_start!r}")
    betas = fixed_betas(param_group) if has_betas(family) else {}
    for name in betas:
        if name in group_start:
            raise ValueError(f"parameter group: start has {name!r}, and so has betas; give one of them")
    if shared is None:
        _warn_of_misplaced(family, param_group)
        return resolve_settings(family, {**start, **group_start, **betas}, group["hyper_lr"], group["bounds"])
    group.update({key: shared[key] for key in SET_SETTINGS if key not in param_group})
    common = resolve_settings(family, start, shared["hyper_lr"], shared["bounds"])
    for name, value in group_start.items():
        if value != common.start.get(name):
            raise ValueError(_refusal("start", group_start, {name: common.start.get(name)}))
    differing = {name for name in betas if betas[name] != common.start[name]}
    learned = learned_betas({"hyper_lr": common.hyper_lr})
    if differing and ("beta1" in learned or not differing.isdisjoint(learned)):
        hint = "; or learn neither beta1 nor beta2: hyper_lr=0.0, or a mapping without them"
        agreed_betas = tuple(common.start[name] for name in betas)
        raise ValueError(_refusal("betas", tuple(betas.values()), agreed_betas) + hint)
    resolved = resolve_settings(family, {**start, **betas}, group["hyper_lr"], group["bounds"])
    asked = {**group, "hyper_lr": resolved.hyper_lr, "bounds": resolved.bounds}
    agreed = {**shared, "hyper_lr": common.hyper_lr, "bounds": common.bounds}
    for key in SET_SETTINGS:
        if asked[key] != agreed[key]:
            raise ValueError(_refusal(key, param_group[key], agreed[key]))
    return resolved


def _refusal(key: str, asked: Any, agreed: Any) -> str:
    return (
        f"parameter group sets {key!r} to {asked!r}, but all groups share one set of coefficients, with {agreed!r}; "
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
    misplaced = {name: param_group[name] for name in _names(family) if name in param_group}
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


def check_family(family: Any, constants: Iterable[str], arguments: Iterable[str]) -> None:
    """Raise where an optimizer cannot be made with a family.

    Args:
        family: what the user gave.
        constants: names of the constants that the user gave.
        arguments: names of the optimizer's arguments, which the family's coefficients and constants must not have.

    Raises:
        TypeError: it is no family, cannot be hashed, or has no such constant.
        ValueError: a parameter group would have two things of one name.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be an instance of mada_optim.Family, got {family!r}")
    try:
        hash(family)
    except TypeError:
        hint = "declare it with @dataclass(frozen=True), or define __hash__"
        raise TypeError(f"family must be hashable, and {type(family).__name__} is not; {hint}") from None
    unknown = [name for name in constants if name not in family.constants]
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}; constants of {family.name}: {list(family.constants)}")
    taken = {"params", "param_names", *arguments, *SET_TENSORS, *INTERNAL_KEYS} - {"constants"}
    if has_betas(family):
        taken.add("betas")
    for name in (*family.constants, *_names(family)):
        if name in taken:
            raise ValueError(f"family: {family.name} has a coefficient or constant {name!r}, a name that is taken")
        taken.add(name)


def _names(family: Family) -> list[str]:
    return [coefficient.name for coefficient in family.coefficients]
