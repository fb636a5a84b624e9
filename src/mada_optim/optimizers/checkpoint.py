"""Loading a state_dict: what it must hold, and how it fills the parameter groups and the state.

All that is wrong with a state_dict is found before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mada_optim.arguments import is_number
from mada_optim.engine.coefficient_set import SET_SETTINGS, SET_TENSORS, CoefficientSet, Group
from mada_optim.engine.parameter_state import PENDING, ParameterState, State
from mada_optim.families import Family
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.optimizers.groups import STORED_KEYS
from mada_optim.tensors.devices import device_with_values, has_values
from mada_optim.tensors.distributed import fill

if TYPE_CHECKING:
    from mada_optim.optimizers.base import HypergradientOptimizer

# Arguments that came to torch's optimizers after their first release, or are ours alone; what a checkpoint written
# without them was made with.
LATER_ARGUMENTS = {
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "state_dtype": None,
    "stochastic_rounding": False,
    "hyper_delay": 0,
}


@contextmanager
def loading(optimizer: HypergradientOptimizer, coefficient_sets: Callable[[], list[CoefficientSet]]) -> Iterator[None]:
    """Let torch's ``load_state_dict`` check a state_dict before it changes anything, and fill the state as we do.

    torch itself would cast every buffer to the dtype of its parameter.

    Args:
        optimizer: that loads.
        coefficient_sets: returns its sets of coefficients.
    """
    family = optimizer.family
    loaded: dict[str, Any] = {}

    def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        groups = complete_groups(saved["param_groups"], optimizer.param_groups, optimizer.defaults["hyper_per_group"])
        saved = {**saved, "param_groups": groups}
        check_fits(family, saved, optimizer.param_groups, [name for name in optimizer.defaults if name != "betas"])
        loaded.update(saved)
        ids = {saved_id for group in groups for saved_id in group["params"]}
        return {**saved, "state": {key: value for key, value in saved["state"].items() if key not in ids}}

    def fill_in(_: Optimizer) -> None:
        fill_state(family, loaded, coefficient_sets(), optimizer.param_groups, optimizer.state)

    hooks = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(fill_in, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def complete_groups(saved: list[Group], current_groups: list[Group], per_group: bool) -> list[Group]:
    """Return the parameter groups of a state_dict, with what they lack.

    torch.distributed.checkpoint loses everything in a group without parameters (pytorch#143828). In other groups it
    loses empty dicts and the difference between a tuple and a list. Where there was no ``hyper_delay`` yet, no
    hypergradient waits.

    Args:
        saved: groups of the state_dict.
        current_groups: those of the optimizer that loads it.
        per_group: whether each of them has coefficients of its own.
    """
    if len(saved) != len(current_groups):
        return saved
    shared = () if per_group else (*SET_SETTINGS, *SET_TENSORS, "special")
    example: Group = next((group for group in saved if group["params"]), {})
    common = {key: example[key] for key in shared if key in example}
    completed = []
    for current, group in zip(current_groups, saved, strict=True):
        lacking: Group = {key: value for key, value in current.items() if isinstance(value, dict) and not value}
        if "hyper_delay" not in group:
            lacking["hyper_waiting"] = torch.zeros_like(current["hyper_waiting"])
        group = {**lacking, **group} if group["params"] else {**current, **common, **group}
        completed.append({key: _with_tuples(value, current.get(key)) for key, value in group.items()})
    return completed


def check_fits(family: Family, saved: Mapping[str, Any], current_groups: list[Group], arguments: Iterable[str]) -> None:
    """Raise ValueError where a state_dict is of another family or does not fit the parameters, and say how.

    Args:
        family: of the optimizer that loads it.
        saved: the state_dict, its groups completed.
        current_groups: those of the optimizer.
        arguments: names of the optimizer's arguments, which every group must have.
    """
    groups = saved["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in current_groups]:
        return  # torch's own check, which follows, says what is wrong
    expected = (*arguments, *SET_TENSORS, *STORED_KEYS)
    for index, (current, saved_group) in enumerate(zip(current_groups, groups, strict=True)):
        where = f"in parameter group {index}"
        saved_family = saved_group.get("family")
        if saved_family != current["family"]:
            raise ValueError(
                f"state_dict is of family {saved_family!r}, this optimizer of {current['family']!r} {where}"
            )
        missing = [key for key in expected if key not in saved_group and key not in LATER_ARGUMENTS]
        if missing:
            raise ValueError(f"state_dict has no {missing[0]!r} {where}; was it written by another version?")
        for key in ("special", "hyper_per_group"):
            if saved_group[key] != current[key]:
                raise ValueError(f"state_dict has {key}={saved_group[key]!r}, this optimizer {current[key]!r} {where}")
        for key in SET_TENSORS:
            _check_shape(key, saved_group[key], current[key].shape, where)
        for param, saved_id in zip(current["params"], saved_group["params"], strict=True):
            buffers = saved["state"].get(saved_id)
            if not buffers:
                continue
            if not has_values(param.device):
                raise ValueError(
                    f"state_dict cannot be loaded while parameters are on the {param.device.type} device, where the "
                    "buffers would lose their values; call model.to_empty(device=...) first"
                )
            where_param = f"of parameter {saved_id}"
            if not is_number(buffers.get("step")):  # as torch's optimizers kept it once
                _check_shape("step", buffers.get("step"), torch.Size(), where_param)
            update = FamilyInGroup(family, saved_group)
            names = _stored_names(update, buffers)
            for name in names:
                _check_shape(name, buffers.get(name), param.shape, where_param)
            for name, shape in update.statistics.items():
                _check_shape(name, buffers.get(name), torch.Size(shape(param.shape)), where_param)
            if "pending_grad" in names:
                _check_shape("pending", buffers.get("pending"), torch.Size(), where_param)


def fill_state(
    family: Family, saved: Mapping[str, Any], sets: Iterable[CoefficientSet], current_groups: list[Group], state: State
) -> None:
    """Fill an optimizer's state from a state_dict that fits, without aliasing it; buffers keep their precision.

    Args:
        family: of the optimizer.
        saved: the state_dict, its groups completed.
        sets: of coefficients, whose groups hold what the state_dict has. Changed.
        current_groups: those of the optimizer.
        state: of the optimizer. Changed.
    """
    for coefficients in sets:
        groups = coefficients.groups
        coefficients.move_to(device_with_values(param for group in groups for param in group["params"]))
        for group in groups:
            for key in SET_SETTINGS:
                if group[key] == groups[0][key]:  # one object, as before: a change in one is for all
                    group[key] = groups[0][key]
    for group, saved_group in zip(current_groups, saved["param_groups"], strict=True):
        for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
            buffers = saved["state"].get(saved_id)
            if buffers:
                update = FamilyInGroup(family, group)
                state[param] = ParameterState(update).initial(param, _stored_names(update, buffers))
                for name, tensor in state[param].items():
                    fill(tensor, torch.as_tensor(buffers[name]))


def _stored_names(update: FamilyInGroup, buffers: Mapping[str, Any]) -> list[str]:
    """Return the names of a parameter's buffers to load: those that its group needs, and those saved for learning.

    Where learning has stopped or begun again without a step since, the group needs others for learning than were saved.
    """
    is_pending = any(name in buffers for name in PENDING)
    return [*update.buffers, "pending_grad"] if is_pending else list(update.buffers)


def _with_tuples(value: Any, example: Any) -> Any:
    """Return ``value``, with tuples for lists where ``example`` has tuples."""
    if isinstance(value, dict) and isinstance(example, dict):
        return {key: _with_tuples(item, example.get(key)) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) and isinstance(example, tuple) else value


def _check_shape(name: str, value: Any, shape: torch.Size, where: str) -> None:
    if value is None:
        raise ValueError(f"state_dict has no {name!r} {where}; was it written by another version?")
    actual = tuple(value.shape) if isinstance(value, Tensor) else None
    if actual != tuple(shape):
        raise ValueError(f"state_dict has {name} of shape {actual} {where}, expected {tuple(shape)}")
